"""A pretended GPU for a build of torch without CUDA: compiled once, loaded before torch, then asked as a real one is.

Torch looks for CUDA when it is imported and not again, so the library (pretended_gpu.cpp) must be there before: a process
is started with `environment()` and calls `pretend()` first of all.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = "NVLM_PRETENDED_GPU"
"""Environment variable: where the library of this process lies."""
COMPILERS = ("c++", "g++", "clang++")
MEMORY_BYTES = 80 * 2**30
COMPUTE_CAPABILITY = (9, 0)

WaitListener = Callable[[str], None]
_listeners: list[WaitListener] = []
"""Told of each call by which the host waits for the device, by name of the call."""


def find_compiler() -> str | None:
    """A C++ compiler; None where there is none."""
    names = (os.environ["CXX"],) if "CXX" in os.environ else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def build() -> Path:
    """The library, compiled once for each release of torch and kept in a folder of this user beside temporary files.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    torch_folder = _torch_folder()
    known = hashlib.sha256(SOURCE.read_bytes() + f"{version('torch')} {torch_folder}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"nvlm_pretended_gpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    library = folder / f"{known}.so"
    if not library.exists():
        _compile(library, torch_folder)
    return library


def _torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _compile(library: Path, torch_folder: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise UserError(
            "a GPU is pretended by a library of C++ and this machine has no compiler; install g++, or set CXX to one"
        )
    include, binaries = torch_folder / "include", torch_folder / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        command += [f"-L{binaries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{binaries}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{SOURCE.name} does not compile against torch {version('torch')}: {done.stderr[-2000:]}")
        made.replace(library)  # whole or not at all, also where two processes compile


def environment() -> dict[str, str]:
    """Variables of a process that is to pretend a GPU, beside those that it inherits."""
    library = str(build())
    return {LIBRARY: library, "LD_PRELOAD": library, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@contextlib.contextmanager
def listening(listener: WaitListener) -> Any:
    """Within it, `listener` is told of each synchronisation that is asked for by name."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _wait(name: str) -> None:
    for listener in _listeners:
        listener(name)


def pretend() -> None:
    """From here on torch has one GPU. Call once, in a process that was started with `environment()`."""
    if LIBRARY not in os.environ:
        raise RuntimeError("a pretended GPU needs the variables of gpu_check.pretended_gpu.environment")
    ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL).nvlm_pretend_a_gpu()

    import torch

    cuda: Any = torch.cuda
    for name, answer in _answers(torch).items():
        setattr(cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "current_device"):
        setattr(cuda.random, name, getattr(cuda, name))
    accelerator: Any = torch.accelerator
    accelerator.is_available, accelerator.device_count = cuda.is_available, cuda.device_count
    accelerator.synchronize = cuda.synchronize
    module: Any = torch
    module.Event = Event


class Stream:
    """The only stream; its work is done as soon as it is asked for."""

    device_index = stream_id = cuda_stream = 0
    device_type = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import torch

        self.device = torch.device("cuda", 0)

    def wait_stream(self, *args: Any) -> None:
        """Of the device, not of the host."""

    def wait_event(self, *args: Any) -> None:
        """Of the device, not of the host."""

    def record_event(self, event: Any = None) -> Any:
        """An event."""
        return event or Event()

    def synchronize(self) -> None:
        """The host waits."""
        _wait("Stream.synchronize")

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass


class Event:
    """A mark in the stream, passed at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        """Put it into the stream."""

    def wait(self, *args: Any) -> None:
        """Of the device, not of the host."""

    def synchronize(self) -> None:
        """The host waits."""
        _wait("Event.synchronize")

    def query(self) -> bool:
        """Whether it has been passed."""
        return True

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds between two marks; there is no clock."""
        return 0.0


class Properties:
    """What torch says of the GPU."""

    name = "pretended GPU"
    major, minor = COMPUTE_CAPABILITY
    multi_processor_count = 132
    total_memory = MEMORY_BYTES


class _Generator:
    """The CPU's random numbers under the GPU's name."""

    def __init__(self, torch: Any) -> None:
        self.get_state, self.set_state = torch.get_rng_state, torch.set_rng_state
        self.manual_seed, self.initial_seed = torch.manual_seed, torch.initial_seed


def _answers(torch: Any) -> dict[str, Any]:
    """Functions of `torch.cuda` by name."""

    def always(
        value: Any,
    ) -> Callable[..., Any]:  # a function of its own each time: torch's compiler keeps rules by function
        return lambda *args, **kwargs: value

    return {
        "_lazy_init": always(None),
        "init": always(None),
        "is_available": always(True),
        "is_initialized": always(True),
        "device_count": always(1),
        "current_device": always(0),
        "set_device": always(None),
        "get_device_capability": always(COMPUTE_CAPABILITY),
        "get_device_name": always(Properties.name),
        "get_device_properties": always(Properties),
        "is_bf16_supported": always(True),
        "synchronize": lambda *args, **kwargs: _wait("cuda.synchronize"),
        "current_stream": lambda *args, **kwargs: Stream(),
        "default_stream": lambda *args, **kwargs: Stream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "set_stream": always(None),
        "Stream": Stream,
        "Event": Event,
        "is_current_stream_capturing": always(False),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": always(None),
        "default_generators": [_Generator(torch)],
        "memory_allocated": always(0),
        "max_memory_allocated": always(0),
        "memory_reserved": always(0),
        "max_memory_reserved": always(0),
        "reset_peak_memory_stats": always(None),
        "mem_get_info": always((MEMORY_BYTES, MEMORY_BYTES)),
        "empty_cache": always(None),
    }

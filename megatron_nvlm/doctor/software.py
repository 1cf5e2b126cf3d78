"""Versions of what the run stands on, against what was tested."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from megatron_nvlm.doctor.findings import Finding, bad, good, note
from megatron_nvlm.parallel.device import cuda_and_nccl_versions

DISTRIBUTION = "megatron-nvlm"
TESTED = {
    "python": ("3.11", "3.12", "3.13"),
    "torch": ("2.11.0", "2.13.0"),
    "megatron-core": ("0.16.1", "0.19.2"),
    "transformer-engine": (),
    "apex": (),
}
"""Versions that docs/status.md has a proof of; for those of which none is named, nothing was run."""
_OPTIONAL = ("transformer-engine", "apex")


def check_versions(backend: str) -> Iterator[Finding]:
    """Each package: within the bounds of setup.py, and whether that version was tested.

    Args:
        backend: `model.backend` of the run; `te` needs Transformer Engine.
    """
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, requires(DISTRIBUTION) or [])}
    for name, tested in TESTED.items():
        installed = platform.python_version() if name == "python" else _version(name)
        if installed is None:
            needed = name not in _OPTIONAL or (name == "transformer-engine" and backend == "te")
            if needed:
                yield bad("versions", f"{name} is not installed; install it, or use the image of the Dockerfile")
            else:
                yield note("versions", f"{name} is not installed; backend {backend} does without it")
            continue
        release = installed.split("+")[0]
        if name in bounds and not bounds[name].contains(release, prereleases=True):
            yield bad(
                "versions",
                f"{name} {installed} is installed and {name}{bounds[name]} is needed; install such a version",
            )
        elif any(release == one or (name == "python" and release.startswith(f"{one}.")) for one in tested):
            yield good("versions", f"{name} {installed}")
        else:
            known = f"tested: {', '.join(tested)}" if tested else "no version was tested"
            yield note("versions", f"{name} {installed} ({known})")
    yield _cuda()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> Finding:
    versions = cuda_and_nccl_versions()
    if versions is None:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        return note("versions", f"no CUDA device is seen ({built}); computes on the CPU over gloo")
    return good("versions", f"CUDA {versions[0]}, NCCL {versions[1]}")

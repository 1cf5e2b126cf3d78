"""The only file that patches Megatron-core or asks for its version.

Megatron-core (0.16.1 and its successors to 0.19) runs on CPU with gloo once the few places that name `torch.cuda`
outright are led to the CPU, and its distributed optimizer resumes correctly with torch's AdamW once its `step` is fixed.
Each patch says where core needs it; none changes what core computes.
"""

import contextlib
import ctypes
import inspect
import math
import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.managers import SyncManager
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PR_SET_PDEATHSIG = 1
"""Linux's prctl: which signal this process gets when its parent dies."""
_CPU = torch.device("cpu")
_installed_mode: TorchFunctionMode | None = None


def leave_core_uncompiled() -> None:
    """Without a GPU, have core's fused functions run as they are written; called before core is imported (quiet.py).

    Core decorates them with `torch.compile` as it is imported (core/jit.py), and that imports PyTorch's compiler: a third
    of the processor time in which a process starts. On gloo their settings are off, so that none is called.
    """
    if "megatron.core" in sys.modules or torch.cuda.is_available():
        return
    uncompiled: Any = ModuleType("megatron.core.jit")
    uncompiled.jit_fuser = uncompiled.noop_decorator = lambda function: function
    uncompiled.enable_jit_fuser = uncompiled.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = uncompiled


def _names_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and str(device).startswith("cuda")


class CudaNamesToCpu(TorchFunctionMode):
    """Leads `device="cuda"`, `.cuda()` and `.type()` to the CPU, as core's schedules, clipping and optimizer use them.

    Sites in 0.16.1: schedules.py (token counts, shapes), clip_grads.py, optimizer.py, utils.py create tensors on "cuda";
    clip_grads.py and distrib_optimizer.py compare `.type()` with "torch.cuda.FloatTensor", and refuse float64, which
    core's optimizers compute as they do float32; a float64 tensor (tests compare layouts so) is named like a float32 one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.", 1).replace("DoubleTensor", "FloatTensor")
        return result


class _NullStream:
    """Stands where core (0.19: DistributedDataParallel) waits on CUDA streams; CPU work is already in order."""

    device = _CPU

    def wait_stream(self, *args: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, *args: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def run_core_on_cpu() -> None:
    """Make Megatron-core run on the CPU; a second call changes nothing. GPUs of the machine are out of sight afterwards."""
    global _installed_mode
    if _installed_mode is not None:
        return
    cuda: Any = torch.cuda
    accelerator: Any = torch.accelerator
    # Of a machine with GPUs whose user chose the CPU: core and PyTorch ask for them in many places.
    cuda.is_available = accelerator.is_available = lambda: False
    cuda.device_count = accelerator.device_count = lambda: 0
    cuda.current_device = lambda: _CPU  # rotary_pos_embedding.py, p2p_communication.py, param_and_grad_buffer.py
    cuda.synchronize = lambda *args, **kwargs: None  # p2p_communication.py, checkpointing
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # tensor_parallel/random.py
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.current_stream = lambda *args, **kwargs: _NullStream()  # DistributedDataParallel from 0.19 on
    cuda.default_stream = lambda *args, **kwargs: _NullStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()

    import megatron.core.tensor_parallel.random as core_random

    core_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    core_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _installed_mode = CudaNamesToCpu()
    _installed_mode.__enter__()


def deaf_and_not_alone() -> None:
    """In a process that works for a save: no request to stop is for it, and it ends with its rank (Linux)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_checkpoint_process() -> None:
    """Start the process through which core's checkpoint writers report, before core does at its first save.

    torchrun signals the whole process group of a rank that is to stop: started by core, the process dies of it, and the save
    that was asked for fails with BrokenPipeError; and it outlives a rank that is killed. A test interrupts a run after a
    save and fails without this.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", True) is not None:
        return  # it is there already, or this release of core has none
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=deaf_and_not_alone)
    patched: Any = filesystem_async
    patched._results_queue = manager.Queue()
    patched._nvlm_manager = manager  # it shuts down when nobody holds it


def core_version() -> str:
    """The release of Megatron-core that runs, without the commit that 0.19 appends of whatever repository is around it."""
    import megatron.core

    return str(megatron.core.__version__).partition("+")[0]


def is_newer_than_core(release: str) -> bool:
    """Whether a release of Megatron-core is newer than the one that runs; patches of one minor release are equals."""
    return minor_release(release) > minor_release(core_version())


def minor_release(release: str) -> tuple[int, ...]:
    """(0, 19) of 0.19.2, and of 0.19rc1."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return tuple(map(int, found.groups())) if found else ()


def own_checkpoint_writer() -> dict[str, Any]:
    """Keywords of core's `dist_checkpointing.save` by which core's own code writes, not nvidia-resiliency-ext.

    From 0.17 on the latter is the default of saves in the background: an error where it is not installed, and its requests
    are for a queue of its own. 0.16 has no such choice.
    """
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def mend_distributed_optimizer() -> None:
    """Mend the resume of core's DistributedOptimizer with torch's AdamW (without Transformer Engine or apex).

    Two faults of 0.16.1 to 0.19.2: loading a `fully_reshardable` state raises KeyError on "step"; and after loading, all
    parameters share ONE `step` tensor, so each step adds the number of parameters to it and the bias correction is
    silently wrong. A test trains across a resume and fails without this.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if getattr(DistributedOptimizer, "_nvlm_mended", False):
        return
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    def set_states_with_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        set_states(self, model_param, tensors)

    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    patched: Any = DistributedOptimizer
    patched._set_main_param_and_optimizer_states = set_states_with_step
    patched.load_state_dict = load_with_own_steps
    patched.sharded_param_state_fully_reshardable = _own_slices
    patched.load_parameter_state_from_fully_reshardable = _take_own_slices
    patched._nvlm_mended = True


def keep_gradient_norms_on_device() -> None:
    """Make core's optimizers clip without a word from the host; the norm that they return is a scalar tensor (float64).

    Core (0.16.1 to 0.19.2) reads the norm before it clips, so the device stands still until the host has launched the
    update; where neither Transformer Engine nor apex is installed, it reads the norm of each parameter.
    """
    from megatron.core.optimizer import clip_grads, optimizer

    patched: Any = optimizer
    if patched.get_grad_norm_fp32 is not clip_grads.get_grad_norm_fp32:
        return
    patched.get_grad_norm_fp32 = _gradient_norm
    patched.clip_grad_by_total_norm_fp32 = _clip_gradients


def _gradient_norm(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> torch.Tensor:
    """L2 norm over the ranks of a group, in float32 as core's."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    assert norm_type == 2
    gradients = [grads_for_norm] if torch.is_tensor(grads_for_norm) else list(grads_for_norm)
    if not gradients:
        norm = torch.zeros(1, device=torch.cuda.current_device())
    elif clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        norm = torch.norm(torch.stack(torch._foreach_norm(gradients)).float())[None]
    else:
        flag = torch.zeros(1, dtype=torch.int, device=gradients[0].device)
        norm = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, flag, [gradients], False)[0]
    squared = norm**2
    torch.distributed.all_reduce(squared, group=grad_stats_parallel_group)
    return squared[0].double().sqrt()


def _clip_gradients(
    parameters: Any, max_norm: float, total_norm: torch.Tensor, use_decoupled_grad: bool = False
) -> None:
    """Scale gradients down to the norm; factor 1 where they are within it, as nobody knows that here."""
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    parameters = [parameters] if torch.is_tensor(parameters) else parameters
    found = [getattr(parameter, name, None) for parameter in parameters]
    gradients = [gradient.detach() for gradient in found if gradient is not None]
    if not gradients:
        return
    factor = max_norm / (total_norm + 1e-6)
    factor = torch.where(factor < 1, factor, 1.0)  # not a number: 1, as core's
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def use_known_message_shapes() -> None:
    """Let pipeline stages take the shapes of messages from `config.message_shapes`, where it is set.

    Core's stages send each other the shape before each message and read it from the device, which both wait for.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    patched: Any = P2PCommunicator
    if getattr(patched, "_nvlm_shapes", False):
        return
    original = patched._communicate_shapes

    def known(self: Any, *args: Any, **kwargs: Any) -> Any:
        shapes = getattr(self.config, "message_shapes", None)
        return original(self, *args, **kwargs) if shapes is None else shapes.exchange(*args, **kwargs)

    patched._communicate_shapes = known
    patched._nvlm_shapes = True


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangular part of a tensor."""


def boxes_of(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """The flat range [start, end) of a tensor as rectangular parts, in order; each is contiguous."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        for offsets, sizes in boxes_of(shape[1:], start - last * row, end - last * row):
            yield (last, *offsets), (1, *sizes)
        return
    for offsets, sizes in boxes_of(shape[1:], start - (first - 1) * row, row if start < first * row else 0):
        yield (first - 1, *offsets), (1, *sizes)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offsets, sizes in boxes_of(shape[1:], 0, end - last * row):
        yield (last, *offsets), (1, *sizes)


def _views(described: Any, shape: torch.Size) -> Iterator[tuple[Any, Box]]:
    """How core describes a parameter of this rank: each part that it saves, and which part of the parameter that is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(described, ShardedTensor):
        yield described, (tuple(0 for _ in shape), tuple(shape))
        return
    whole = torch.empty(shape, device="meta")
    built = described.build_fn(described.key, whole, described.replica_id, None)
    for part in nested_values(built):
        if part.data.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            continue  # it holds the place of a part that this rank has not
        place, offsets = part.data.storage_offset(), []
        for stride in whole.stride():
            offsets.append(place // stride)
            place %= stride
        yield part, (tuple(offsets), tuple(part.data.shape))


def _slices(self: Any, described: Any, parameter: torch.nn.Parameter, prefix: str, tensor: Any) -> list[Any]:
    """This rank's flat share of a parameter's moment or main weight, as parts of the whole model's tensor."""
    owned = self._get_model_param_range_map(parameter)["param"]
    found = []
    read = 0
    for offsets, sizes in boxes_of(parameter.shape, owned.start, owned.end):
        piece = tensor.detach()[read : read + math.prod(sizes)].view(sizes)
        read += math.prod(sizes)
        for part, (first, shape) in _views(described, parameter.shape):
            begin = [max(own, other) for own, other in zip(offsets, first, strict=True)]
            end = [min(o + s, f + n) for o, s, f, n in zip(offsets, sizes, first, shape, strict=True)]
            if any(b >= e for b, e in zip(begin, end, strict=True)):
                continue
            data = piece[tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, offsets, strict=True))]
            within = [0] * part.prepend_axis_num + [b - f for b, f in zip(begin, first, strict=True)]
            found.append(
                replace(
                    part,
                    key=f"{prefix}.{part.key}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_offset=tuple(g + w for g, w in zip(part.global_offset, within, strict=True)),
                    axis_fragmentations=None,
                    replica_id=(*part.replica_id[:-1], getattr(self, "distributed_optimizer_instance_id", 0)),
                )
            )
    return found


def _owned_tensors(self: Any) -> Iterator[tuple[int, torch.nn.Parameter, str, torch.Tensor]]:
    """Moments and main weights of the parameters of which this rank has a share, each parameter with a number."""
    for number, parameter in enumerate(self.model_param_gbuf_map):
        for name, tensor in self._get_main_param_and_optimizer_states(parameter).items():
            if name != "step":  # among the groups
                yield number, parameter, name, tensor


def _own_slices(self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None) -> Any:
    """The state of the distributed optimizer as each data-parallel rank has it, without a word between ranks.

    Core's own form `fully_reshardable` gathers the state of a whole model replica on each of its data-parallel ranks: at a
    save, H-72B on 80 GB of each GPU runs out of memory, and a node's host needs 1.7 TB. Where gradients have several
    buckets it also gives moments to wrong parameters (0.16.1 to 0.19.2). Here a rank gives its own share, which begins and
    ends within rows, as rectangular parts under the same names: the checkpoint's tensors are the same, whole, and load
    under any layout. A load reads a rank's share alone.
    """
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    described, _ = extract_matching_values(
        model_sharded_state_dict, lambda value: isinstance(value, ShardedTensor | ShardedTensorFactory)
    )
    by_parameter = {value.data: value for value in nested_values(described)}
    state: dict[int, dict[str, list[Any]]] = {}
    for number, parameter, name, tensor in _owned_tensors(self):
        parts = _slices(self, by_parameter[parameter], parameter, f"optimizer.state.{name}", tensor)
        state.setdefault(number, {})[name] = parts
    self._nvlm_described = by_parameter if is_loading else None
    return state


def _take_own_slices(self: Any, state_dict: dict[int, dict[str, list[torch.Tensor]]]) -> None:
    """Put what was read for `_own_slices` where it belongs."""
    with torch.no_grad():
        for number, parameter, name, tensor in _owned_tensors(self):
            parts = _slices(self, self._nvlm_described[parameter], parameter, "", tensor)
            for part, read in zip(parts, state_dict.get(number, {}).get(name, []), strict=True):
                part.data.copy_(read)

"""Does a layout compute what one process computes? Three training steps of several small models, compared on each rank.

`record` runs cases in one process and writes what they gave; `compare` runs them on the ranks of a layout and returns how
far each loss, gradient and weight lies from that, relative to its own size. Nothing is compared across precisions.
"""

import dataclasses
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch.overrides import TorchFunctionMode

from megatron_nvlm.models.build import build_chunks
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.rope_scaling import YARN, RopeScaling
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.initialise import initialise, mark_splits, named_parameters, split_of
from megatron_nvlm.models.lora import LoraConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS
from megatron_nvlm.models.sharding import Split, cut, full_shape, gather_parts, join
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups, start_groups
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import StepResult, run_step, wrap_model
from megatron_nvlm.training.trainable import COMPONENTS, freeze
from tests.support.batches import step_samples
from tests.support.tiny import micro_batch_of

# Four groups, so that four tensor-parallel ranks have one each; three vision heads, which no even number of ranks divides.
LANGUAGE_PRESETS["parity"] = LanguagePreset(4, 64, 96, 8, 4, 1024, 10_000, "qwen2")
LANGUAGE_PRESETS["parity_6_layers"] = LanguagePreset(6, 64, 96, 8, 4, 1024, 10_000, "qwen2")
# Head norms, heads of 12 and not 64 / 8, an output layer that is the embedding, and a scaled rotary embedding.
LANGUAGE_PRESETS["parity_qwen3"] = LanguagePreset(
    4,
    64,
    96,
    8,
    4,
    1024,
    10_000,
    "qwen3",
    tied_embeddings=True,
    kv_channels=12,
    rope_scaling=RopeScaling(YARN, 4.0, 16),
)
# An odd grid, filled up before pixel shuffle.
VISION_PRESETS["parity_siglip"] = VisionPreset(
    2, 48, 96, 3, "LayerNorm", qk_norm=False, qkv_bias=True, tile_size=56, patch_size=18, family="siglip"
)
VISION_PRESETS["parity"] = VisionPreset(2, 48, 96, 3, "RMSNorm", qk_norm=True, qkv_bias=False, tile_size=56)

STEPS = 3
FROZEN_VISION = ("vision_projection", "cross_attention", "language_model")
WITH_ADAPTERS = ("vision_projection", "cross_attention", "lora")
PRETRAIN = ("vision_projection", "cross_attention")


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on."""

    variant: str
    batches: str
    """A name of BATCH_RUNS."""
    trainable: tuple[str, ...] = COMPONENTS
    qk_norm: bool = False
    interval: int = 2
    offset: int | None = None
    precision: str = "fp64"
    language: str = "parity"
    vision: str = "parity"
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def file_name(self) -> str:
        """Where `record` keeps what it gave."""
        return f"{zlib.crc32(repr(self).encode()):08x}.pt"


@dataclass(frozen=True)
class Layout:
    """How many ranks, how the model is split over them, and what is computed twice to save memory."""

    ranks: int
    parallelism: ParallelismConfig
    recompute: str = "none"


@dataclass
class Record:
    """What the steps of a case gave; whole tensors by name."""

    losses: list[float] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def layout(ranks: int, recompute: str = "none", **parallelism: Any) -> Layout:
    """A row of a table of layouts, in short names."""
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "sp": "sequence_parallel",
        "dist_opt": "use_distributed_optimizer",
        "vision": "vision_placement",
        "tiles": "vision_tiles_at_once",
    }
    settings = {short.get(key, key): value for key, value in parallelism.items()}
    return Layout(ranks, ParallelismConfig(**{"use_distributed_optimizer": False, **settings}), recompute)


def make_chunks(case: Case, own: Layout, device: torch.device) -> ModelChunks:
    """The case's model with every weight, gates, norms and biases too, away from its starting value."""
    config = ModelConfig(
        case.variant,
        case.language,
        case.vision,
        cross_attention=CrossAttentionConfig(interval=case.interval, offset=case.offset, qk_norm=case.qk_norm),
        init_std=0.06,
        recompute=own.recompute,
        lora=case.lora,
    )
    groups = get_groups()
    dtype = PRECISIONS[case.precision].parameter_dtype
    chunks = build_chunks(resolve_model(config), own.parallelism, groups, get_single_rank_groups(), dtype, device)
    mark_splits(chunks)
    initialise(chunks, seed=3)
    ranks, rank = groups.tp.size(), groups.tp.rank()
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            split = split_of(name, chunks)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 0.1 * torch.randn(full_shape(parameter.shape, split, ranks), generator=generator)
            if name.endswith((".gate", "scale", "bias", ".lora_b")) or "norm" in name:
                parameter.add_(cut(noise, split, rank, ranks).to(device) + 0.3 * name.endswith(".gate"))
    return chunks


class KeepDouble(TorchFunctionMode):
    """Core's distributed optimizer makes every gradient float32; in float64 runs it stays as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands where `run_step` has an optimizer, updates in double precision and, if `keep`, notes the gradients before."""

    def __init__(self, optimizer: MegatronOptimizer, chunks: ModelChunks, own: Layout, keep: bool) -> None:
        self.optimizer, self.chunks, self.own, self.keep = optimizer, chunks, own, keep
        self.gradients: list[dict[str, torch.Tensor]] = []

    def zero_grad(self) -> None:
        """Pass on."""
        self.optimizer.zero_grad()

    def step(self) -> Any:
        """Note, then pass on."""
        if self.keep:
            gradients = {
                name: whole(split_of(name, self.chunks), name, self._gradient(parameter))
                for name, parameter in named_parameters(self.chunks)
                if parameter.requires_grad
            }
            self.gradients.append(gradients)
        with KeepDouble():
            return self.optimizer.step()

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if not self.own.parallelism.use_distributed_optimizer:
            return parameter.main_grad
        # The distributed optimizer leaves each replica with its own piece of the sum.
        gradient = torch.zeros_like(parameter.main_grad)
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            try:
                piece = part._get_model_param_range_map(parameter)["param"]
            except KeyError:
                continue
            gradient.view(-1)[piece.start : piece.end] = parameter.main_grad.view(-1)[piece.start : piece.end]
        dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
        return gradient


def whole(split: Split | None, name: str, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor from the parts of the tensor-parallel ranks; what is not split must be the same on all."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = gather_parts(part.detach(), group)
    if split is None:
        for other in parts[1:]:
            torch.testing.assert_close(other, parts[0], rtol=1e-9, atol=1e-12, msg=f"{name} differs by rank")
    return join(parts, split).clone()


def train(case: Case, own: Layout, device: torch.device, steps: int = STEPS, keep: bool = True) -> Record:
    """The steps of a case on this rank. `keep`: gradients and weights too, not the losses alone."""
    chunks = make_chunks(case, own, device)
    freeze(chunks, case.trainable)
    models = wrap_model(chunks, PRECISIONS[case.precision], own.parallelism.use_distributed_optimizer)
    # No clipping: core computes the norm in float32, and clipping would pass its rounding on to the weights.
    settings = OptimizerConfig(max_lr=1e-3, min_lr=1e-3, warmup_steps=0, clip_grad=1e9)
    optimizer, scheduler = build_optimizer(
        settings, models, steps, PRECISIONS[case.precision], own.parallelism.use_distributed_optimizer
    )
    recorder = Recorder(optimizer, chunks, own, keep)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    record = Record()
    for step in range(steps):
        micro_batches = [
            micro_batch_of(samples, case.variant, own.parallelism.token_multiple)
            for samples in step_samples(case.batches, step)
        ]
        if own.parallelism.virtual_pipeline_model_parallel_size > 1:
            rows = max(len(micro_batch.tokens) + len(micro_batch.context_tokens) for micro_batch in micro_batches)
            for chunk in chunks:
                chunk.payload_tokens = (rows + 15) // 8 * 8
        mine = micro_batches[replica::replicas]
        result = run_step(models, iter(mine), len(mine), device, recorder)  # type: ignore[arg-type]
        scheduler.step(increment=1)
        note(record, result)
    if keep:
        record.gradients = recorder.gradients
        record.weights = {
            name: whole(split_of(name, chunks), name, parameter) for name, parameter in named_parameters(chunks)
        }
    return record


def note(record: Record, result: StepResult) -> None:
    """Loss and targets of all replicas; 0 before the last stage."""
    sums = torch.tensor([result.loss_sum, result.num_targets], dtype=torch.float64)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    record.losses.append(sums[0].item())
    record.targets.append(sums[1].item())
    record.grad_norms.append(result.grad_norm)


def record(cases: list[Case], folder: Path) -> None:
    """One process computes every case that the folder does not have yet."""
    one = Layout(1, ParallelismConfig(use_distributed_optimizer=False))
    device = use_device()
    start_groups(one.parallelism, device, seed=1)
    for case in cases:
        path = folder / case.file_name
        if not path.exists():
            torch.save(dataclasses.asdict(train(case, one, device.torch_device, keep=case.precision == "fp64")), path)


@dataclass(frozen=True)
class Comparison:
    """Of one rank: how far it is from one process, relative, by what is compared."""

    is_last_stage: bool
    losses: dict[str, float]
    gradients: dict[str, float]
    weights: dict[str, float]


def compare(rows: dict[str, tuple[list[Case], Layout]], folder: Path) -> dict[str, list[Comparison]]:
    """Layouts of one number of ranks, each with its cases, one after the other; called on every rank."""
    device = use_device()
    found = {}
    for name, (cases, own) in rows.items():
        start_groups(own.parallelism, device, seed=1, timeout_seconds=120)
        found[name] = [compare_case(case, own, device.torch_device, folder) for case in cases]
        parallel_state.destroy_model_parallel()
    return found


def compare_case(case: Case, own: Layout, device: torch.device, folder: Path) -> Comparison:
    """Train, and measure every number against that of one process."""
    expected = Record(**torch.load(folder / case.file_name, mmap=True))
    got = train(case, own, device, keep=case.precision == "fp64")
    last = parallel_state.is_pipeline_last_stage()
    losses = distances("grad norm", got.grad_norms, expected.grad_norms)
    if last:
        assert got.targets == expected.targets
        losses |= distances("loss", got.losses, expected.losses)
    gradients = {
        f"{name}, step {step}": distance(gradient, expected.gradients[step][name])
        for step, by_name in enumerate(got.gradients)
        for name, gradient in by_name.items()
    }
    weights = {name: distance(weight, expected.weights[name]) for name, weight in got.weights.items()}
    return Comparison(last, losses, gradients, weights)


def distances(what: str, got: list[float], expected: list[float]) -> dict[str, float]:
    """Of a number a step; exact zeros must meet."""
    return {
        f"{what} of step {step}": abs(a - b) / abs(b) if b else abs(a)
        for step, (a, b) in enumerate(zip(got, expected, strict=True))
    }


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of the second. What has no gradient in one process must have none in any layout."""
    difference, size = float((got - expected).norm()), float(expected.norm())
    return difference / size if size else difference

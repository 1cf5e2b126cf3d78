"""One rank's whole training step on fake CUDA tensors, in a fake process group.

Nothing is computed and no memory is taken, so the step of one rank of a 72B run fits a laptop. An operation on tensors of
two devices raises. Runs in a process of its own (`run_fake_steps`), since torch must find the pretended GPU when it starts.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.errors import UserError
from megatron_nvlm.gpu_check import pretended_gpu

MODULE = "megatron_nvlm.gpu_check.fake_step"
_BEGIN, _ERROR = "fake step: ", "fake step is refused: "
"""Before the line of a result, or of a user's mistake, among what others print."""


@dataclass(frozen=True)
class FakeStepInput:
    """What to run."""

    config: str
    """Run file, or its name in configs/."""
    overrides: tuple[str, ...]
    world_size: int
    stage: int = 0
    """Pipeline stage; of it the first tensor-parallel rank of the first replica."""
    micro_batches: int = 2
    num_tokens: int | None = None
    """Decoder tokens of a sample; None for data.sequence_length."""
    regular_tiles: int | None = None
    """None for tiling.max_tiles."""
    tag_tokens: int = 5


@dataclass(frozen=True)
class SentBytes:
    """Messages of a kind in one step."""

    operation: str
    group: str
    ranks: int
    count: int
    bytes_sent: int
    """By this rank, as a ring sends it."""


@dataclass(frozen=True)
class FakeStep:
    """The second of two steps, when the optimizer has its state."""

    waits: dict[str, dict[str, int]]
    """Kind of wait -> place -> how often."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    """State included."""
    operations: int
    """Kernels that the step launches, at least."""
    triton_launches: dict[str, int]
    messages: tuple[SentBytes, ...]
    tokens: int
    """Of a micro-batch."""
    context_tokens: int
    tiles: int

    @property
    def total_waits(self) -> int:
        """Of all kinds at all places."""
        return sum(count for places in self.waits.values() for count in places.values())

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def run_fake_steps(wanted: Sequence[FakeStepInput]) -> list[FakeStep]:
    """Carry them out one after the other in a new process.

    Raises:
        UserError: a step ends in an error, which a mix of devices is.
    """
    variables = {**os.environ, **pretended_gpu.environment(), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", MODULE, json.dumps([asdict(one) for one in wanted])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    lines = [line.removeprefix(_BEGIN) for line in done.stdout.splitlines() if line.startswith(_BEGIN)]
    if done.returncode:
        failed = wanted[min(len(lines), len(wanted) - 1)]
        told = next((line for line in done.stderr.splitlines() if line.startswith(_ERROR)), None)
        raise UserError(
            told.removeprefix(_ERROR)
            if told
            else f"the step of {failed.config} on fake tensors ends in an error:\n{done.stderr[-3000:]}"
        )
    return [_read(line) for line in lines]


def _read(line: str) -> FakeStep:
    told = json.loads(line)
    messages = tuple(SentBytes(**message) for message in told.pop("messages"))
    return FakeStep(**told, messages=messages)


def main(arguments: Sequence[str]) -> None:
    """Print each result as a line of JSON."""
    pretended_gpu.pretend()
    for given in json.loads(arguments[0]):
        wanted = FakeStepInput(**{**given, "overrides": tuple(given["overrides"])})
        try:
            print(_BEGIN + json.dumps(asdict(_step(wanted))), flush=True)
        except UserError as error:
            sys.exit(f"{_ERROR}{error}")


def _step(wanted: FakeStepInput) -> FakeStep:
    import torch

    from megatron_nvlm.config.load import load_run
    from megatron_nvlm.core_compat import (
        keep_gradient_norms_on_device,
        mend_distributed_optimizer,
        use_known_message_shapes,
    )
    from megatron_nvlm.runs.resolve import resolve_run

    mend_distributed_optimizer()
    keep_gradient_norms_on_device()
    use_known_message_shapes()
    run = resolve_run(load_run(wanted.config, list(wanted.overrides)), wanted.world_size)
    with _fake_world(wanted, run.config.parallelism):
        rank = _Rank(run, wanted, torch.device("cuda", 0))
        return rank.measure()


@contextmanager
def _fake_world(wanted: FakeStepInput, parallelism: Any) -> Any:
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_nvlm.parallel.groups import lay_out_groups, stop_groups

    rank = wanted.stage * (wanted.world_size // parallelism.pipeline_model_parallel_size)  # tensor, data, then pipeline
    dist.init_process_group("fake", rank=rank, world_size=wanted.world_size, store=FakeStore())
    try:
        lay_out_groups(parallelism, with_cpu_groups=False)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        stop_groups()


class _Rank:
    """One rank of a run, built and stepped twice."""

    def __init__(self, run: Any, wanted: FakeStepInput, device: Any) -> None:
        from megatron_nvlm.gpu_check.ledger import Ledger

        self.run, self.wanted, self.device = run, wanted, device
        self.ledger = Ledger(_group_names())
        self.micro_batch = self._make_micro_batch()

    def _make_micro_batch(self) -> Any:
        """As the loader hands it over, with the pixels where this rank encodes."""
        import torch

        from megatron_nvlm.estimate.sample import SampleShape, make_sample
        from megatron_nvlm.sequence.micro_batch import pack

        config, model, wanted = self.run.config, self.run.model, self.wanted
        shape = SampleShape(
            wanted.num_tokens or config.data.sequence_length,
            config.tiling.max_tiles if wanted.regular_tiles is None else wanted.regular_tiles,
            0 if config.tiling.tag_format == "none" else wanted.tag_tokens,
        )
        tokens_per_tile = model.vision.tokens_per_tile
        sample, count = make_sample(shape, model.variant, tokens_per_tile), config.training.micro_batch_size
        size = config.tiling.tile_size
        tiles = torch.zeros(count * sample.num_tiles, 3, size, size, dtype=torch.uint8)
        return pack(
            *([sample] * count, tiles, [f"sample_{number}" for number in range(count)], tokens_per_tile),
            self.run.token_multiple,
            model.variant.needs_cross_attention,
        )

    def measure(self) -> FakeStep:
        """Build, step twice, and report the second step."""
        import torch

        from megatron_nvlm.gpu_check.host_waits import HostWaits
        from megatron_nvlm.gpu_check.stand_ins import standing_in
        from megatron_nvlm.training.step import run_step

        waits = HostWaits()
        for value in vars(self.micro_batch).values():  # the loader of a run on GPUs pins its micro-batches
            if isinstance(value, torch.Tensor):
                waits.mark_pinned(value)
        with standing_in() as launches, self.ledger, waits:
            models, optimizer, sizes = self._build()
            for _ in range(2):
                waits.take()
                launches.found.clear()
                self.ledger.start_step()
                batches = [self.micro_batch] * self.wanted.micro_batches
                run_step(models, iter(batches), len(batches), self.device, optimizer)
            found, state = waits.take(), self.ledger.live_bytes
        ledger = self.ledger
        return FakeStep(
            waits=_by_kind(found),
            weight_bytes=sizes[0],
            gradient_bytes=sizes[1] - sizes[0],
            optimizer_bytes=state - sizes[1],
            peak_bytes=ledger.peak_bytes,
            operations=sum(ledger.operations.values()) + sum(launches.found.values()),
            triton_launches=dict(launches.found),
            messages=tuple(
                SentBytes(*message, count, ledger.sent_bytes[message])
                for message, count in sorted(ledger.messages.items())
                if message.ranks > 1
            ),
            tokens=len(self.micro_batch.tokens),
            context_tokens=len(self.micro_batch.context_tokens),
            tiles=self.micro_batch.num_tiles,
        )

    def _build(self) -> tuple[Any, Any, tuple[int, int]]:
        """(wrapped chunks, optimizer, (bytes of weights, bytes of weights and gradients)), as runs/trainer.py makes them."""
        from megatron_nvlm.runs.components import make_chunks
        from megatron_nvlm.training.optimizer import build_optimizer
        from megatron_nvlm.training.step import wrap_model
        from megatron_nvlm.training.trainable import freeze

        config, precision = self.run.config, self.run.precision
        distributed = config.parallelism.use_distributed_optimizer
        chunks = make_chunks(self.run.model, config.parallelism, precision, self.device, 1, lambda name: True)
        freeze(chunks, self.run.trainable)
        for tensor in [*chunks.parameters(), *chunks.buffers()]:
            self.ledger.hold(tensor.data)
        weights = self.ledger.live_bytes
        models = wrap_model(chunks, precision, distributed)
        gradients = self.ledger.live_bytes
        steps = config.training.train_steps or 10
        optimizer, _ = build_optimizer(config.optimizer, models, steps, precision, distributed)
        for chunk in chunks:
            chunk.config.grad_scale_func = optimizer.scale_loss
            chunk.payload_tokens = self.run.payload_tokens
        return models, optimizer, (weights, gradients)


def _group_names() -> dict[str, str]:
    """Torch's names of the groups -> ours."""
    from megatron.core import parallel_state

    groups = {
        "data": parallel_state.get_data_parallel_group(),
        "data, context": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
    }
    names: dict[str, str] = {}
    for name, group in groups.items():
        names.setdefault(group.group_name, name.partition(",")[0])
    return names


def _by_kind(found: Counter[Any]) -> dict[str, dict[str, int]]:
    waits: dict[str, dict[str, int]] = {}
    for wait, count in found.most_common():
        waits.setdefault(wait.what, {})[wait.place] = count
    return waits


if __name__ == "__main__":
    main(sys.argv[1:])

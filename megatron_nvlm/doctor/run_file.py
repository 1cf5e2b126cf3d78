"""The run file: valid, its data and weights readable, its layout within the memory of a GPU."""

from collections.abc import Iterator
from pathlib import Path

from megatron_nvlm.checkpoint.retention import read_latest
from megatron_nvlm.data.loading.builder import OpenedData
from megatron_nvlm.doctor.findings import Finding, bad, good, or_sentence
from megatron_nvlm.doctor.storage import check_space
from megatron_nvlm.errors import UserError
from megatron_nvlm.estimate.dry_run import GIB, DryRun, dry_run
from megatron_nvlm.estimate.sample import SampleShape
from megatron_nvlm.estimate.step_time import Hardware
from megatron_nvlm.hf.open_folders import open_folders
from megatron_nvlm.parallel.device import gpu_memory_bytes
from megatron_nvlm.runs.components import open_data
from megatron_nvlm.runs.plan import TAG_TOKENS, make_plan
from megatron_nvlm.runs.resolve import ResolvedRun


def check_data(run: ResolvedRun) -> Finding:
    """Tokenizer and shards: opened as training opens them, and the first sample of each set read."""

    def read() -> Finding:
        data: OpenedData = open_data(run)
        for shards in data.sets:
            shards.read(0)
        samples = sum(sum(shards.index.shard_sizes) for shards in data.sets)
        return good(
            "data", f"tokenizer of {data.pipeline.tokenizer.vocab_size} ids; {len(data.sets)} sets, {samples} samples"
        )

    return or_sentence("data", read)


def check_weights(run: ResolvedRun) -> Finding:
    """Folders that the run starts with: there, and of the names and shapes of this model."""

    def read() -> Finding:
        named = run.config.checkpoint.initial_weights
        if named is not None:
            path = Path(named)
            if not path.exists() or (read_latest(path / "checkpoints") is None and not (path / ".metadata").exists()):
                raise UserError(
                    f"checkpoint.initial_weights={named} holds no checkpoint; name the folder of a run or of one of its "
                    "checkpoints"
                )
            return good("weights", f"starts with {named}")
        folders = open_folders(run.model)
        return good(
            "weights", "new" if folders is None else "all tensors of the named folders have the shapes of this model"
        )

    return or_sentence("weights", read)


def check_layout(run: ResolvedRun, memory_gib: float | None) -> Iterator[Finding]:
    """What the dry run says of a GPU's memory and of the size of checkpoints."""
    found = gpu_memory_bytes()
    hardware = Hardware(memory_gib=memory_gib or (found / GIB if found else Hardware().memory_gib))
    tags = 0 if run.config.tiling.tag_format == "none" else TAG_TOKENS
    sample = SampleShape(run.config.data.sequence_length, run.config.tiling.max_tiles, tags)
    estimate = dry_run(make_plan(run, sample), hardware, run.config.model.backend)
    fullest = max(stage.total_bytes for stage in estimate.stages) / GIB
    seen = f"the fullest of {run.world_size} ranks needs {fullest:.1f} GiB of {hardware.memory_gib:g} (an estimate)"
    if estimate.free_gib(hardware) < 0:
        yield bad(
            "layout",
            f"{seen}; `python -m tools.dry_run --suggest` lists layouts that fit, or set --gpu-memory-gib to your GPU's",
        )
    else:
        yield good("layout", seen)
    kept = run.config.checkpoint.keep_last
    yield check_space(run.run_dir.path, checkpoint_bytes(run, estimate), kept)


def checkpoint_bytes(run: ResolvedRun, estimate: DryRun) -> int:
    """Size of a checkpoint: all weights, and the optimizer's state of what trains."""
    every = sum(estimate.whole_parameters.values())
    trained = sum(count for part, count in estimate.whole_parameters.items() if part in run.trainable)
    return every * run.precision.parameter_dtype.itemsize + trained * run.precision.optimizer_bytes

"""Resolves a run file: looks up names and refuses mistakes once, before anything else."""

from dataclasses import dataclass

from megatron_nvlm.config.rules import check_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.models.config import ResolvedModel, resolve_model
from megatron_nvlm.models.precision import Precision, find_precision
from megatron_nvlm.runs.run_dir import RunDir


@dataclass(frozen=True)
class ResolvedRun:
    """A run that can be carried out on `world_size` ranks."""

    config: RunConfig
    world_size: int
    run_dir: RunDir
    model: ResolvedModel
    precision: Precision
    trainable: tuple[str, ...]
    """Components that train."""

    @property
    def train_steps(self) -> int:
        """Length of the run; of one that is given in epochs, `count_steps` (runs/length.py) tells it."""
        steps = self.config.training.train_steps
        if steps is None:
            raise ValueError("the steps of this run have not been counted")
        return steps

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.config.parallelism.data_parallel_size(self.world_size)

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this."""
        return self.config.parallelism.token_multiple * self.precision.token_multiple

    @property
    def payload_tokens(self) -> int:
        """Tokens of every message between virtual pipeline stages; 0 where messages are as long as their micro-batch."""
        parallelism = self.config.parallelism
        if parallelism.virtual_pipeline_model_parallel_size == 1:
            return 0
        multiple = self.token_multiple
        tokens = self.config.training.micro_batch_size * self.config.data.sequence_length
        # Decoder and context tokens are each padded to a multiple (pack), and the context has at least one.
        return -(-tokens // multiple) * multiple + -(-max(parallelism.payload_vision_tokens, 1) // multiple) * multiple


def resolve_run(config: RunConfig, world_size: int) -> ResolvedRun:
    """Look everything up and check it.

    Raises:
        UserError: the first rule of config/rules.py that the run breaks, or a name that does not exist.
    """
    run = look_up(config, world_size)
    check_run(config, run.model, world_size)
    return run


def look_up(config: RunConfig, world_size: int) -> ResolvedRun:
    """Names looked up, rules not checked: for the dry run, which tries layouts until one is allowed."""
    return ResolvedRun(
        config,
        world_size,
        RunDir.named(config.run_dir),
        resolve_model(config.model),
        find_precision(config.training.precision),
        config.trainable_components(),
    )

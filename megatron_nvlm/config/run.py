"""A run: its sections, each defined beside what it configures."""

from dataclasses import dataclass, field

from megatron_nvlm.checkpoint.save_load import CheckpointConfig
from megatron_nvlm.data.config import DataConfig, ValidationConfig
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.training.loop import TrainingConfig
from megatron_nvlm.training.metrics import LoggingConfig
from megatron_nvlm.training.optimizer import OptimizerConfig
from megatron_nvlm.training.skipped_updates import StabilityConfig
from megatron_nvlm.training.trainable import RecipeConfig


@dataclass(frozen=True)
class RunConfig:
    """A run file: complete and flat."""

    run_dir: str
    """Folder of everything that the run writes; a run whose folder exists goes on from its last checkpoint."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    tiling: TilingConfig = field(default_factory=TilingConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def trainable_components(self) -> tuple[str, ...]:
        """The components that train; UserError if the recipe names what there is not."""
        return self.recipe.trainable_components(self.model.lora.rank > 0)

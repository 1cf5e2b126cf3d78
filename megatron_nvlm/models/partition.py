"""How a model is split over ranks, and which splits are possible. Knows sizes, not processes."""

from dataclasses import dataclass

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.presets import LanguagePreset


@dataclass(frozen=True)
class PartitionConfig:
    """Section `parallelism` of a run; data parallelism is what remains of the ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages, each a range of layers."""
    sequence_parallel: bool = False
    """Shard the rows of norms and residuals over the tensor-parallel ranks as well."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer's state over the data-parallel ranks."""

    @property
    def row_multiple(self) -> int:
        """Rows of a micro-batch are padded to a multiple of this, so that sequence shards are equal."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def data_parallel_size(self, world_size: int) -> int:
        """Model replicas among `world_size` ranks; UserError if they do not divide."""
        replica = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        if world_size % replica:
            raise UserError(
                f"{world_size} ranks cannot be divided into model replicas of {replica} "
                f"(parallelism.tensor_model_parallel_size {self.tensor_model_parallel_size} x "
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size}); start a multiple of {replica} ranks"
            )
        return world_size // replica


def check_partition(partition: PartitionConfig, language: LanguagePreset, heads: int, groups: int) -> None:
    """Refuse a split that the model's sizes do not allow, naming the two numbers that disagree.

    Args:
        heads, groups: of the gated cross-attention, or of the language model where there is none.
    """
    tensor, pipeline = partition.tensor_model_parallel_size, partition.pipeline_model_parallel_size
    if tensor < 1 or pipeline < 1:
        raise UserError("parallelism: tensor_model_parallel_size and pipeline_model_parallel_size must be at least 1")
    for what, count in (
        ("query groups of the language model", language.num_query_groups),
        ("attention heads of the language model", language.num_attention_heads),
        ("feed-forward columns of the language model", language.ffn_hidden_size),
        ("rows of the padded vocabulary", language.vocab_size),
        ("attention heads of the gated cross-attention", heads),
        ("query groups of the gated cross-attention", groups),
    ):
        if count % tensor:
            raise UserError(
                f"parallelism.tensor_model_parallel_size is {tensor}, which does not divide the {count} {what}; "
                f"choose a divisor of {count}"
            )
    if heads % groups:
        raise UserError(f"model.cross_attention: {heads} attention heads cannot share {groups} query groups evenly")
    if pipeline > language.num_layers:
        raise UserError(
            f"parallelism.pipeline_model_parallel_size is {pipeline}, more than the {language.num_layers} layers "
            "of the language model; each stage needs at least one layer"
        )
    if language.num_layers % pipeline:
        raise UserError(
            f"parallelism.pipeline_model_parallel_size is {pipeline}, which does not divide the {language.num_layers} "
            f"layers of the language model; choose a divisor of {language.num_layers}"
        )
    if partition.sequence_parallel and tensor == 1:
        raise UserError(
            "parallelism.sequence_parallel needs parallelism.tensor_model_parallel_size of at least 2; "
            "set it to false or raise the size"
        )

"""How a model is split over ranks, and which splits are possible. Knows sizes, not processes."""

from dataclasses import dataclass

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.pipeline_layout import chunk_layers

VISION_PLACEMENTS = ("first_stage", "replicated", "tensor_parallel")


@dataclass(frozen=True)
class ParallelismConfig:
    """Section `parallelism` of a run; data parallelism is what remains of the ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages, each a range of layers."""
    sequence_parallel: bool = False
    """Shard the tokens of norms and residuals over the tensor-parallel ranks as well."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer's state over the data-parallel ranks."""
    virtual_pipeline_model_parallel_size: int = 1
    """Parts of each stage; more than 1 interleaves them, which makes the pipeline's bubble smaller."""
    pipeline_layout: str | None = None
    """Megatron-core's string of layers by part of the pipeline, such as Et*13|t*16|t*16|t*15L; null for equal parts."""
    payload_vision_tokens: int = 0
    """Context tokens that a micro-batch may send from stage to stage. Virtual stages only: their messages have one length,
    micro_batch_size * sequence_length + this; otherwise messages are as long as the micro-batch."""
    context_parallel_size: int = 1
    """Ranks that share a sample's tokens: 1 only, see config/rules.py."""
    expert_model_parallel_size: int = 1
    """Ranks that share experts: 1 only, see config/rules.py."""
    vision_placement: str = "first_stage"
    """Where tiles are encoded. first_stage: its tensor-parallel ranks share the tiles of each micro-batch. replicated: all
    ranks of a model replica share the tiles of the step, before the pipeline starts. tensor_parallel: each layer of the
    encoder is split over the tensor-parallel ranks of the first stage."""
    vision_tiles_at_once: int = 8
    """Most tiles that a rank encodes at a time, which bounds the encoder's memory."""

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this, so that sequence shards are equal."""
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


def check_parallelism(
    parallelism: ParallelismConfig, language: LanguagePreset, vision: VisionPreset, heads: int, groups: int
) -> None:
    """Refuse a split that the model's sizes do not allow, naming the two numbers that disagree.

    Args:
        heads, groups: of the gated cross-attention, or of the language model where there is none.
    """
    tensor, pipeline = parallelism.tensor_model_parallel_size, parallelism.pipeline_model_parallel_size
    if tensor < 1 or pipeline < 1:
        raise UserError("parallelism: tensor_model_parallel_size and pipeline_model_parallel_size must be at least 1")
    for what, count in (
        ("query groups of the language model", language.num_query_groups),
        ("attention heads of the language model", language.num_attention_heads),
        ("feed-forward columns of the language model", language.ffn_hidden_size),
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
    _check_pipeline(parallelism, language.num_layers)
    _check_vision(parallelism, vision)
    if parallelism.sequence_parallel and tensor == 1:
        raise UserError(
            "parallelism.sequence_parallel needs parallelism.tensor_model_parallel_size of at least 2; "
            "set it to false or raise the size"
        )


def _check_pipeline(parallelism: ParallelismConfig, num_layers: int) -> None:
    stages, chunks = parallelism.pipeline_model_parallel_size, parallelism.virtual_pipeline_model_parallel_size
    if chunks < 1 or parallelism.payload_vision_tokens < 0:
        raise UserError(
            "parallelism.virtual_pipeline_model_parallel_size must be at least 1 and payload_vision_tokens at least 0"
        )
    if chunks > 1 and stages == 1:
        raise UserError(
            f"parallelism.virtual_pipeline_model_parallel_size is {chunks} without a pipeline; set it to 1 or "
            "pipeline_model_parallel_size to at least 2"
        )
    if stages * chunks > num_layers:
        virtual = f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
        raise UserError(
            f"parallelism.pipeline_model_parallel_size is {stages}{virtual}, more than the {num_layers} layers "
            "of the language model; each stage needs at least one layer"
        )
    chunk_layers(parallelism.pipeline_layout, stages, chunks, num_layers)


def _check_vision(parallelism: ParallelismConfig, vision: VisionPreset) -> None:
    tensor, placement = parallelism.tensor_model_parallel_size, parallelism.vision_placement
    if placement not in VISION_PLACEMENTS:
        raise UserError(f"parallelism.vision_placement is {placement!r}; choose one of {', '.join(VISION_PLACEMENTS)}")
    if parallelism.vision_tiles_at_once < 1:
        raise UserError(
            f"parallelism.vision_tiles_at_once is {parallelism.vision_tiles_at_once}; it must be at least 1"
        )
    if placement == "tensor_parallel" and vision.ffn_hidden_size % tensor:
        raise UserError(
            f"parallelism.vision_placement is tensor_parallel and tensor_model_parallel_size {tensor} does not divide the "
            f"{vision.ffn_hidden_size} feed-forward columns of the vision model; choose replicated"
        )

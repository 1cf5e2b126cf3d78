"""What trains in each stage: the paper's Tables 10 and 11 as one small table, applied by module name."""

from dataclasses import dataclass

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.initialise import count_parameters, named_parameters, part_of
from megatron_nvlm.models.nvlm_model import NVLMModel

PARTS = ("vision_model", "vision_projection", "cross_attention", "language_model")

# (stage) -> the parts that train. Variants without a part have nothing of that name to train.
# Tables 10 and 11: the encoder is frozen in every stage; X's one-layer projector is new, so it trains with its layers.
STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": ("vision_projection", "cross_attention"),
    "sft": ("vision_projection", "cross_attention", "language_model"),
}


@dataclass(frozen=True)
class StageConfig:
    """Section `stage` of a run."""

    name: str = "sft"
    """pretrain or sft: which parts train by default."""
    trainable: list[str] | None = None
    """Parts that train instead of the stage's own, of vision_model, vision_projection, cross_attention, language_model."""

    def trainable_parts(self) -> tuple[str, ...]:
        """The parts that train; UserError if stage or part is unknown."""
        if self.name not in STAGES:
            raise UserError(f"stage.name is {self.name!r}; choose one of {', '.join(STAGES)}")
        parts = tuple(self.trainable) if self.trainable is not None else STAGES[self.name]
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise UserError(f"stage.trainable is {list(parts)}; name at least one of {', '.join(PARTS)}")
        return parts


def freeze(model: NVLMModel | ModelChunks, trainable: tuple[str, ...]) -> None:
    """Freeze everything, then let the named parts train."""
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(part_of(name) in trainable)


def describe(model: NVLMModel | ModelChunks, trainable: tuple[str, ...]) -> list[str]:
    """A line per part of this stage's model: parameters, and whether it trains."""
    counts = count_parameters(model)
    return [
        f"{part:18s} {counts[part]:>15,} parameters, {'trains' if part in trainable else 'frozen'}"
        for part in PARTS
        if part in counts
    ]

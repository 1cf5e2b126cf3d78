"""What trains under each recipe: the paper's Tables 10 and 11 as one small table, applied by module name."""

from dataclasses import dataclass

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.chunks import ModelChunks
from megatron_nvlm.models.initialise import ADAPTERS, component_of, count_parameters, named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel

COMPONENTS = ("vision_model", "vision_projection", "cross_attention", "language_model", ADAPTERS)

# Recipe -> the components that train. A variant without a component has nothing of that name to train.
# Tables 10 and 11: the encoder is frozen in every recipe; X's one-layer projector is new, so it trains with its layers.
RECIPES: dict[str, tuple[str, ...]] = {
    "pretrain": ("vision_projection", "cross_attention"),
    "sft": ("vision_projection", "cross_attention", "language_model"),
}


@dataclass(frozen=True)
class RecipeConfig:
    """Section `recipe` of a run."""

    name: str = "sft"
    """pretrain or sft: which components train by default."""
    trainable: list[str] | None = None
    """Components that train instead of the recipe's own (COMPONENTS)."""

    def trainable_components(self, has_adapters: bool = False) -> tuple[str, ...]:
        """The components that train; UserError if recipe or component is unknown, or adapters are where they cannot train.

        Args:
            has_adapters: whether the language model has low-rank adapters, which train instead of it.
        """
        if self.name not in RECIPES:
            raise UserError(f"recipe.name is {self.name!r}; choose one of {', '.join(RECIPES)}")
        by_name = tuple(ADAPTERS if has_adapters and each == "language_model" else each for each in RECIPES[self.name])
        components = tuple(self.trainable) if self.trainable is not None else by_name
        unknown = [component for component in components if component not in COMPONENTS]
        if unknown or not components:
            raise UserError(f"recipe.trainable is {list(components)}; name at least one of {', '.join(COMPONENTS)}")
        if has_adapters and "language_model" in components:
            raise UserError(
                f"recipe.trainable names language_model, and model.lora.rank gives it adapters that train instead; name "
                f"{ADAPTERS} in its place, or set model.lora.rank=0"
            )
        if has_adapters and ADAPTERS not in components and self.trainable is None:
            raise UserError(
                f"model.lora.rank gives the language model adapters and recipe.name {self.name} does not train them; set "
                "recipe.name=sft, or list the components in recipe.trainable"
            )
        if ADAPTERS in components and not has_adapters:
            raise UserError(
                f"recipe.trainable names {ADAPTERS} and model.lora.rank is 0, so there are no adapters; set it"
            )
        return components


def freeze(model: NVLMModel | ModelChunks, trainable: tuple[str, ...]) -> None:
    """Freeze everything, then let the named components train."""
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(component_of(name) in trainable)


def describe(model: NVLMModel | ModelChunks, trainable: tuple[str, ...]) -> list[str]:
    """A line per component of this stage's model: parameters, and whether it trains."""
    counts = count_parameters(model)
    return [
        f"{component:18s} {counts[component]:>15,} parameters, {'trains' if component in trainable else 'frozen'}"
        for component in COMPONENTS
        if component in counts
    ]

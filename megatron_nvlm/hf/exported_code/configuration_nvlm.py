"""Configuration of NVLM-D, NVLM-X and NVLM-H for Hugging Face transformers.

NVLM-D's config.json has the keys of the public release. X and H add `cross_attention`: `layers` (numbers from 0 of the
decoder layers that have it), `num_attention_heads`, `num_key_value_heads` and `qk_norm`.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

from megatron_nvlm.models.families.rope_scaling import RopeScaling

_LANGUAGE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "norm_type",
    "layer_norm_eps",
)
_CROSS_KEYS = ("layers", "num_attention_heads", "num_key_value_heads")
_RELEASE_DUMMY_HEADS = 7
"""What the release's code adds to the encoder's heads, whatever their number: 25 + 7 = 32 divide by 8 GPUs."""


class Section(SimpleNamespace):
    """A part of config.json as attributes; keys that this code does not know are kept as they are."""


class NVLMConfig(PretrainedConfig):
    """What the three variants share; use the class of a variant.

    Args:
        llm_config: of the language model (keys of Qwen2's and Llama's config.json). `attention_bias` is the bias of
            queries, keys and values alone.
        vision_config: of the InternViT; `num_dummy_heads` heads after the real ones are stored and must be zero.
        cross_attention: of NVLM-X and NVLM-H; None for NVLM-D.
        force_image_size: pixels along an edge of a tile.
        img_context_token_id: id that stands in `input_ids` where a vision token goes; None if the inputs say it
            otherwise (`vision_index`).
    """

    model_type = "NVLM"
    variant = ""
    has_no_defaults_at_init = True

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        cross_attention: dict[str, Any] | None = None,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        select_layer: int = -1,
        img_context_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.llm_config = Section(**(llm_config or {}))
        self.vision_config = Section(**(vision_config or {}))
        self.cross_attention = cross_attention
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.select_layer = select_layer
        self.img_context_token_id = img_context_token_id
        kwargs["variant"] = self.variant
        # The model itself shares the embedding where llm_config says so; transformers must not tie anything more.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json."""
        output = super().to_dict()
        output["llm_config"] = dict(vars(self.llm_config))
        output["vision_config"] = dict(vars(self.vision_config))
        return output

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """What transformers' caches and generation ask of a language model."""
        language = self.llm_config
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
        )
        known = {name: getattr(language, name) for name in names if hasattr(language, name)}
        return PretrainedConfig(tie_word_embeddings=False, **known)

    @property
    def attention_bias(self) -> bool:
        """Whether queries, keys and values have biases; Qwen2 does where nothing is said."""
        is_qwen2 = any("Qwen2" in name for name in getattr(self.llm_config, "architectures", None) or [])
        return bool(getattr(self.llm_config, "attention_bias", is_qwen2))

    @property
    def head_size(self) -> int:
        """Of the language model's attention."""
        language = self.llm_config
        own = getattr(language, "head_dim", None)
        return int(own or language.hidden_size // language.num_attention_heads)

    @property
    def query_key_norm(self) -> bool:
        """Whether self-attention has an RMSNorm of each head of queries and keys, as Qwen3 does."""
        return bool(getattr(self.llm_config, "query_key_norm", False))

    @property
    def rope_scaling_settings(self) -> RopeScaling | None:
        """How the rotary embedding is scaled; the release's "dynamic" changes nothing up to max_position_embeddings."""
        settings = getattr(self.llm_config, "rope_scaling", None)
        if not settings or (settings.get("rope_type") or settings.get("type")) in ("default", "dynamic"):
            return None
        return RopeScaling.of(settings, getattr(self.llm_config, "max_position_embeddings", None))

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(getattr(self.llm_config, "tie_word_embeddings", False))

    @property
    def num_dummy_heads(self) -> int:
        """Heads of the encoder that are stored after the real ones."""
        as_released = self.variant == "d" and self.vision_config.norm_type == "rms_norm"
        return int(getattr(self.vision_config, "num_dummy_heads", _RELEASE_DUMMY_HEADS if as_released else 0))

    @property
    def tile_size(self) -> int:
        """Pixels along an edge of a tile."""
        return int(self.force_image_size or self.vision_config.image_size)

    @property
    def vision_depth(self) -> int:
        """Layers of the vision model up to `select_layer`, which counts from the end where it is negative."""
        layers = int(self.vision_config.num_hidden_layers)
        return self.select_layer + (layers + 1 if self.select_layer < 0 else 0)

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of a tile."""
        return ((self.tile_size // self.vision_config.patch_size + 1) // 2) ** 2

    def check(self) -> None:
        """Refuse what the model cannot be built from.

        Raises:
            ValueError: one sentence with the key and what it should be.
        """
        self._check_keys()
        language, vision = self.llm_config, self.vision_config
        heads = [("llm_config", language.num_attention_heads, language.num_key_value_heads)]
        if self.cross_attention is not None:
            heads.append(("cross_attention", *(self.cross_attention[key] for key in _CROSS_KEYS[1:])))
            self._check_layers(self.cross_attention["layers"])
        for section, queries, groups in heads:
            if queries % groups:
                raise ValueError(
                    f"{section}: num_attention_heads {queries} must be a multiple of num_key_value_heads {groups}"
                )
        with_quotient = [("vision_config", vision)]
        if getattr(language, "head_dim", None) is None:
            with_quotient.append(("llm_config", language))
        for section, part in with_quotient:
            if part.hidden_size % part.num_attention_heads:
                raise ValueError(
                    f"{section}: hidden_size {part.hidden_size} must be a multiple of num_attention_heads "
                    f"{part.num_attention_heads}"
                )
        if vision.norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(f"vision_config.norm_type is {vision.norm_type!r}; it must be rms_norm or layer_norm")
        if self.tile_size != vision.image_size or self.tile_size < vision.patch_size:
            raise ValueError(
                f"force_image_size {self.tile_size} must equal vision_config.image_size {vision.image_size} and hold a "
                f"patch of {vision.patch_size} pixels"
            )
        if self.downsample_ratio != 0.5 or self.ps_version != "v2":
            raise ValueError("downsample_ratio must be 0.5 and ps_version v2, the pixel shuffle that NVLM has")

    def _check_keys(self) -> None:
        cross = self.cross_attention
        if self.variant not in ("d", "x", "h"):
            raise ValueError("use NVLM_D_Config, NVLM_X_Config or NVLM_H_Config; the common class is no model's")
        if (cross is not None) != (self.variant != "d"):
            raise ValueError(
                f"cross_attention is {'missing' if cross is None else 'given'} and this is NVLM-{self.variant.upper()}: "
                "NVLM-X and NVLM-H have it, NVLM-D has none"
            )
        sections: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
        sections.append(("llm_config", vars(self.llm_config), _LANGUAGE_KEYS))
        sections.append(("vision_config", vars(self.vision_config), _VISION_KEYS))
        if cross is not None:
            sections.append(("cross_attention", cross, _CROSS_KEYS))
        for name, section, keys in sections:
            missing = [key for key in keys if section.get(key) is None]
            if missing:
                raise ValueError(f"config.json lacks {', '.join(f'{name}.{key}' for key in missing)}")

    def _check_layers(self, layers: list[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer < self.llm_config.num_hidden_layers]
        if wrong or len(set(layers)) != len(layers):
            raise ValueError(
                f"cross_attention.layers is {layers}; it must list different layers from 0 to "
                f"{self.llm_config.num_hidden_layers - 1}"
            )


# Each class has an __init__ of its own: to those without one, transformers 5 gives a dataclass's.
class NVLM_D_Config(NVLMConfig):
    """NVLM-D: all vision tokens stand in the decoder."""

    model_type = "NVLM_D"
    variant = "d"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class NVLM_X_Config(NVLMConfig):
    """NVLM-X: the decoder reads all vision tokens through gated cross-attention."""

    model_type = "NVLM_X"
    variant = "x"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class NVLM_H_Config(NVLMConfig):
    """NVLM-H: the thumbnail stands in the decoder, which reads the tiles through gated cross-attention."""

    model_type = "NVLM_H"
    variant = "h"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

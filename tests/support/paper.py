"""The paper's models as sizes, for counting."""

from megatron_nvlm.accounting.flops import ModelSizes
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.sequence.variants import VARIANTS

TABLE_3_ROWS = {"x": 1024, "h": 1280, "d": 2816}
"""Decoder lengths of the paper's Table 3."""


def paper_sizes(variant: str, recompute: str = "none") -> ModelSizes:
    """The 34B models."""
    return ModelSizes(
        VARIANTS[variant],
        LANGUAGE_PRESETS["yi_34b"],
        VISION_PRESETS["internvit_6b"],
        CrossAttentionConfig(interval=6),
        recompute,
    )

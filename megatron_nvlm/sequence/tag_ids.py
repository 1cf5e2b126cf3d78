"""The ids of an image's tile tags, as a template spells them: the one place that turns tags into tokens."""

from dataclasses import dataclass

from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.templates import Template
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TagIds:
    """Tags of one image."""

    ids: list[list[int]]
    """Of each tile in tile order, the thumbnail's last; for `lay_out_image`."""
    first_in_decoder: str
    """The tag that comes first in the decoder; for `encode_conversation`."""


def encode_tags(grid: Grid, tiling: TilingConfig, variant: Variant, tokenizer: Tokenizer, form: Template) -> TagIds:
    """Tags of an image on this grid.

    Every tag is tokenised alone, but for templates that join text and first tag: there, what the first tag has left once
    the text before it took the token that spans both. That X's and H's tags are spelled like D's is our choice.
    """
    tags = tile_tags(grid, tiling.tag_format, tiling.thumbnail_tag)
    ids = [tokenizer.encode(tag) for tag in tags]
    first = 0 if variant.tags_in_decoder else len(tags) - 1
    if form.joins_first_tag:
        ids[first] = tokenizer.encode_joined(form.before_image, tags[first])[1]
    return TagIds(ids, tags[first])

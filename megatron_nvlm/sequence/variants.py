"""The three architectures as three rows: where the tokens of an image go (NVLM paper, sections 4.2 to 4.4).

| variant | in the decoder's sequence     | in the context of cross-attention | tags                          |
|---------|-------------------------------|-----------------------------------|-------------------------------|
| D       | all tiles and the thumbnail   | nothing                           | before each tile, decoder     |
| X       | nothing of the image          | all tiles and the thumbnail       | in the decoder, tag k: tile k |
| H       | the thumbnail                 | all tiles                         | before each tile, context     |
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Where tiles, thumbnail and tags go, and which projector leads there."""

    name: str
    tiles_in_decoder: bool
    thumbnail_in_decoder: bool
    tiles_in_context: bool
    thumbnail_in_context: bool
    tags_in_decoder: bool
    """Tags of regular tiles stand in the decoder. The thumbnail's tag stands there in every variant (our choice for H)."""
    tags_in_context: bool
    tag_sees_own_tile_only: bool
    projector: str
    """mlp (LayerNorm and two layers) or linear (paper, section 4.5)."""

    @property
    def needs_cross_attention(self) -> bool:
        """Whether anything is read through cross-attention."""
        return self.tiles_in_context or self.thumbnail_in_context


NVLM_D = Variant(
    "d",
    tiles_in_decoder=True,
    thumbnail_in_decoder=True,
    tiles_in_context=False,
    thumbnail_in_context=False,
    tags_in_decoder=True,
    tags_in_context=False,
    tag_sees_own_tile_only=False,
    projector="mlp",
)
NVLM_X = Variant(
    "x",
    tiles_in_decoder=False,
    thumbnail_in_decoder=False,
    tiles_in_context=True,
    thumbnail_in_context=True,
    tags_in_decoder=True,
    tags_in_context=False,
    tag_sees_own_tile_only=True,
    projector="linear",
)
NVLM_H = Variant(
    "h",
    tiles_in_decoder=False,
    thumbnail_in_decoder=True,
    tiles_in_context=True,
    thumbnail_in_context=False,
    tags_in_decoder=False,
    tags_in_context=True,
    tag_sees_own_tile_only=False,
    projector="mlp",
)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (NVLM_D, NVLM_X, NVLM_H)}

"""The sample that a dry run reckons with: one image of the most tiles, then text to the end of the sequence.

It is laid out by the code that lays out training samples, so its tokens and the ranges that they see are the real ones.
"""

from dataclasses import dataclass

import torch

from megatron_nvlm.errors import UserError
from megatron_nvlm.sequence.assemble import AssembledSample, assemble
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.micro_batch import MicroBatch, pack
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.conversation import ImagePiece, TextPiece


@dataclass(frozen=True)
class SampleShape:
    """A sample's sizes."""

    num_tokens: int
    """Decoder tokens, image included."""
    regular_tiles: int
    """Tiles of its image without the thumbnail; 1 is a single tile, 0 no image."""
    tag_tokens: int
    """Tokens of a tile's tag."""


def make_sample(shape: SampleShape, variant: Variant, tokens_per_tile: int) -> AssembledSample:
    """The sample; UserError if its image leaves no row for text."""
    pictures = shape.regular_tiles + (shape.regular_tiles > 1)
    if not pictures:
        return assemble([TextPiece([0] * shape.num_tokens, True)], [])
    layout = lay_out_image([[0] * shape.tag_tokens] * pictures, variant, tokens_per_tile)
    text = shape.num_tokens - len(layout.decoder_tokens)
    if text < 1:
        raise UserError(
            f"an image of {shape.regular_tiles} tiles takes {len(layout.decoder_tokens)} decoder tokens of NVLM-"
            f"{variant.name.upper()} and a sample has {shape.num_tokens}; lower tiling.max_tiles or raise "
            "data.sequence_length"
        )
    return assemble([ImagePiece(0), TextPiece([0] * text, True)], [layout])


def make_micro_batch(shape: SampleShape, variant: Variant, tokens_per_tile: int, samples: int) -> MicroBatch:
    """A micro-batch of copies of the sample, without pixels and without padding."""
    sample = make_sample(shape, variant, tokens_per_tile)
    keys = [f"sample_{number}" for number in range(samples)]
    no_tiles = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return pack([sample] * samples, no_tiles, keys, tokens_per_tile, 1, variant.needs_cross_attention)

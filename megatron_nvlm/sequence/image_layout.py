"""The one source for how many tokens an image takes, where, and what they see. Everything else asks it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nvlm.sequence.variants import Variant


@dataclass(frozen=True)
class ImageLayout:
    """Tokens of one image, counted within the image. Shapes: d its decoder tokens, c its context tokens."""

    num_tiles: int
    """Tiles and thumbnail together."""
    num_vision_tokens: int
    decoder_tokens: np.ndarray
    """[d] ids of tags; 0 where a vision token stands."""
    decoder_vision_index: np.ndarray
    """[d] number of the vision token; -1 for tags."""
    decoder_intervals: np.ndarray
    """[d, 2] range of the image's context tokens that the token sees."""
    decoder_sees_own_tile: np.ndarray
    """[d] true where the range is one tile's alone, whatever images came before."""
    context_tokens: np.ndarray
    """[c] ids of tags; 0 elsewhere."""
    context_vision_index: np.ndarray
    """[c] number of the vision token; -1 for tags."""


def lay_out_image(tag_ids: Sequence[Sequence[int]], variant: Variant, tokens_per_tile: int) -> ImageLayout:
    """Tokens of an image whose tiles bear these tags.

    Args:
        tag_ids: ids of each tile's tag, of any length, in tile order, the thumbnail's last. An image of one tile has
            one tag: its tile is its thumbnail.
        variant: a row of the table in variants.py.
        tokens_per_tile: vision tokens of a tile.
    """
    thumbnail = len(tag_ids) - 1
    decoder: list[_Run] = []
    context: list[_Run] = []
    tile_ranges: dict[int, tuple[int, int]] = {}
    for tile, ids in enumerate(tag_ids):
        is_thumbnail = tile == thumbnail
        in_decoder = variant.thumbnail_in_decoder if is_thumbnail else variant.tiles_in_decoder
        in_context = variant.thumbnail_in_context if is_thumbnail else variant.tiles_in_context
        if is_thumbnail or variant.tags_in_decoder:
            decoder.append(_Run.of_tag(ids, tile))
        if in_decoder:
            decoder.append(_Run.of_tile(tile, tokens_per_tile))
        if in_context:
            if variant.tags_in_context:
                context.append(_Run.of_tag(ids, tile))
            start = sum(len(run.tokens) for run in context)
            context.append(_Run.of_tile(tile, tokens_per_tile))
            tile_ranges[tile] = (start, start + tokens_per_tile)
    num_context_tokens = sum(len(run.tokens) for run in context)
    intervals, own = [], []
    for run in decoder:
        alone = variant.tag_sees_own_tile_only and run.is_tag and run.tile in tile_ranges
        seen = tile_ranges[run.tile] if alone else (0, num_context_tokens)
        intervals.append(np.tile(np.array([seen], dtype=np.int32), (len(run.tokens), 1)))
        own.append(np.full(len(run.tokens), alone))
    return ImageLayout(
        num_tiles=len(tag_ids),
        num_vision_tokens=len(tag_ids) * tokens_per_tile,
        decoder_tokens=_join([run.tokens for run in decoder]),
        decoder_vision_index=_join([run.vision_index for run in decoder]),
        decoder_intervals=np.concatenate([np.zeros((0, 2), dtype=np.int32), *intervals]),
        decoder_sees_own_tile=np.concatenate([np.zeros(0, dtype=bool), *own]),
        context_tokens=_join([run.tokens for run in context]),
        context_vision_index=_join([run.vision_index for run in context]),
    )


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one kind: a tag or a tile."""

    tokens: np.ndarray
    vision_index: np.ndarray
    tile: int
    is_tag: bool

    @staticmethod
    def of_tag(ids: Sequence[int], tile: int) -> "_Run":
        return _Run(np.asarray(ids, dtype=np.int64), np.full(len(ids), -1, dtype=np.int64), tile, True)

    @staticmethod
    def of_tile(tile: int, tokens_per_tile: int) -> "_Run":
        numbers = np.arange(tile * tokens_per_tile, (tile + 1) * tokens_per_tile, dtype=np.int64)
        return _Run(np.zeros(tokens_per_tile, dtype=np.int64), numbers, tile, False)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

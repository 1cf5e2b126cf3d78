"""Pieces of a conversation and the layouts of its images become the tokens of one sample."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_nvlm.sequence.image_layout import ImageLayout
from megatron_nvlm.text.conversation import ImagePiece, TextPiece

IGNORED_LABEL = -100


@dataclass(frozen=True)
class AssembledSample:
    """One sample's tokens (numpy); numbers of vision tokens and context tokens count within the sample.

    Shapes: s decoder tokens, c context tokens.
    """

    tokens: np.ndarray
    """[s] ids; 0 where a vision token stands."""
    labels: np.ndarray
    """[s] the next token; IGNORED_LABEL where it is no target."""
    loss_mask: np.ndarray
    """[s] 1 where the next token is a target."""
    decoder_vision_index: np.ndarray
    """[s] number of the vision token that stands here; -1 for text."""
    context_tokens: np.ndarray
    """[c] ids of tags in the context; 0 elsewhere."""
    context_vision_index: np.ndarray
    """[c] number of the vision token that stands here; -1 for tags."""
    context_intervals: np.ndarray
    """[s, 2] range [start, end) of context tokens that this token sees."""
    num_tiles: int


def assemble(pieces: Sequence[TextPiece | ImagePiece], layouts: Sequence[ImageLayout]) -> AssembledSample:
    """Tokens of one sample.

    What a token sees in the context (design: "one interval per token"; the paper leaves all but the first open): a tag's
    sub-tokens see their own tile (X); the thumbnail's own tokens in the decoder (H) and every token after an image see all
    tiles of the images so far; tokens before the first image see nothing.

    Args:
        pieces: text and images in order.
        layouts: of the images, by their number.
    """
    tokens: list[np.ndarray] = []
    is_target: list[np.ndarray] = []
    decoder_index: list[np.ndarray] = []
    intervals: list[np.ndarray] = []
    context_tokens: list[np.ndarray] = []
    context_index: list[np.ndarray] = []
    vision_before = context_before = 0
    for piece in pieces:
        if isinstance(piece, TextPiece):
            length = len(piece.ids)
            tokens.append(np.asarray(piece.ids, dtype=np.int64))
            is_target.append(np.full(length, piece.is_target))
            decoder_index.append(np.full(length, -1, dtype=np.int64))
            intervals.append(np.tile(np.array([[0, context_before]], dtype=np.int32), (length, 1)))
            continue
        layout = layouts[piece.image_index]
        tokens.append(layout.decoder_tokens)
        is_target.append(np.zeros(len(layout.decoder_tokens), dtype=bool))
        decoder_index.append(_shift(layout.decoder_vision_index, vision_before))
        own = layout.decoder_intervals
        # "All tiles so far" of an image begins at the sample's first context token; a tag's own tile does not.
        start = np.where(layout.decoder_sees_own_tile, own[:, 0] + context_before, 0)
        end = own[:, 1] + context_before
        intervals.append(np.stack([start, end], axis=1).astype(np.int32))
        context_tokens.append(layout.context_tokens)
        context_index.append(_shift(layout.context_vision_index, vision_before))
        vision_before += layout.num_vision_tokens
        context_before += len(layout.context_tokens)
    row = np.concatenate(tokens)
    target = np.concatenate(is_target)
    next_is_target = np.append(target[1:], False)
    return AssembledSample(
        tokens=row,
        labels=np.where(next_is_target, np.append(row[1:], 0), IGNORED_LABEL),
        loss_mask=next_is_target.astype(np.float32),
        decoder_vision_index=np.concatenate(decoder_index),
        context_tokens=np.concatenate([np.zeros(0, dtype=np.int64), *context_tokens]),
        context_vision_index=np.concatenate([np.zeros(0, dtype=np.int64), *context_index]),
        context_intervals=np.concatenate(intervals),
        num_tiles=sum(layout.num_tiles for layout in layouts),
    )


def cut_to(sample: AssembledSample, length: int) -> AssembledSample | None:
    """The sample's first tokens, so that the end of its text is left out.

    What is learned ends before the cut: no end token is learned there (our choice).

    Returns:
        None where that would cut into an image or its tags, or leave nothing to learn.
    """
    cuts_image = (sample.decoder_vision_index[length:] >= 0).any()
    sees_less = sample.context_intervals[length - 1, 1] < len(sample.context_tokens)
    loss_mask = sample.loss_mask[:length].copy()
    loss_mask[-1] = 0  # of the first token that is left out
    if cuts_image or sees_less or not loss_mask.any():
        return None
    labels = sample.labels[:length].copy()
    labels[-1] = IGNORED_LABEL
    return replace(
        sample,
        tokens=sample.tokens[:length],
        labels=labels,
        loss_mask=loss_mask,
        decoder_vision_index=sample.decoder_vision_index[:length],
        context_intervals=sample.context_intervals[:length],
    )


def _shift(index: np.ndarray, by: int) -> np.ndarray:
    return np.where(index >= 0, index + by, -1)

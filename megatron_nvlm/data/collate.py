"""Prepared samples to one micro-batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.sequence.assemble import IGNORED_LABEL, AssembledSample
from megatron_nvlm.sequence.micro_batch import MicroBatch, pack


def build_micro_batch(
    samples: Sequence[PreparedSample],
    pipeline: SamplePipeline,
    token_multiple: int = 1,
    with_pixels: bool = True,
    pin_memory: bool = False,
    keep_tiles: bool = True,
    first_tile: int = 0,
) -> MicroBatch:
    """Prepared samples, or none, as one ragged sequence.

    Args:
        keep_tiles: the micro-batch may keep the memory of a lone sample's tiles; else they are copied.
        first_tile: number of the first tile that the samples hold, if they do not hold all.
    """
    size = pipeline.tiling.tile_size
    number = sum(len(sample.tiles) for sample in samples) if with_pixels else 0
    if number and len(samples) == 1 and keep_tiles and not pin_memory:
        tiles = torch.from_numpy(samples[0].tiles)
    else:
        tiles = torch.empty((number, 3, size, size), dtype=torch.uint8, pin_memory=pin_memory)
        if number:
            np.concatenate([sample.tiles for sample in samples], out=tiles.numpy())
    micro_batch = pack(
        [sample.sequence for sample in samples] or [_NO_SAMPLE],
        tiles,
        [sample.key for sample in samples],
        pipeline.tokens_per_tile,
        token_multiple,
        pipeline.variant.needs_cross_attention,
        first_tile,
    )
    micro_batch = replace(
        micro_batch,
        adjustments=tuple(one.adjustment for one in samples if one.adjustment),
        datasets=tuple(one.dataset for one in samples),
        sample_tiles=tuple(one.sequence.num_tiles for one in samples),
    )
    return micro_batch.pin() if pin_memory else micro_batch


_NO_SAMPLE = AssembledSample(
    tokens=np.zeros(1, dtype=np.int64),
    labels=np.full(1, IGNORED_LABEL, dtype=np.int64),
    loss_mask=np.zeros(1, dtype=np.float32),
    decoder_vision_index=np.full(1, -1, dtype=np.int64),
    context_tokens=np.zeros(0, dtype=np.int64),
    context_vision_index=np.zeros(0, dtype=np.int64),
    context_intervals=np.zeros((1, 2), dtype=np.int32),
    num_tiles=0,
)
"""Stands for the samples of a micro-batch that are all bad, so that it makes the same collectives as any other."""

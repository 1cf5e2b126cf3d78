"""Tiny models and micro-batches, the same in every process: what tests of layouts and of the plain form compare on."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_nvlm.models.build import build_model
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.initialise import initialise, mark_splits, named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.sequence.assemble import AssembledSample, assemble
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.micro_batch import MicroBatch, pack
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.conversation import ImagePiece, TextPiece

VISION = VISION_PRESETS["tiny"]


@dataclass(frozen=True)
class PlainSample:
    """A sample before any layout: runs of text ids (ids, is target) and images (tiles, tags' ids), in order."""

    runs: tuple[object, ...]


@dataclass(frozen=True)
class TextRun:
    ids: list[int]
    is_target: bool


@dataclass(frozen=True)
class ImageRun:
    tiles: torch.Tensor
    """uint8 [tiles, 3, S, S], the thumbnail last."""
    tag_ids: list[list[int]]


def tiny_config(variant: str, qk_norm: bool = False) -> ModelConfig:
    return ModelConfig(
        variant, "tiny", "tiny", cross_attention=CrossAttentionConfig(interval=2, qk_norm=qk_norm), init_std=0.06
    )


def tiny_model(
    config: ModelConfig,
    device: Device,
    parallelism: ParallelismConfig | None = None,
    dtype: torch.dtype = torch.float64,
    gate: float = 0.3,
) -> NVLMModel:
    """A model whose gates stand at `gate` and whose biases, norms and scales are away from their starting values."""
    parallelism = parallelism or ParallelismConfig()
    model = build_model(
        resolve_model(config), parallelism, get_groups(), get_single_rank_groups(), dtype, device.torch_device
    )
    mark_splits(model)
    initialise(model, seed=3)
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if name.endswith(".gate"):
                parameter.fill_(gate)
            elif name.endswith("scale") or "norm" in name:
                # Whole on every rank, so a function of the name gives every layout the same.
                generator = torch.Generator().manual_seed(len(name))
                noise = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.device))
    return model


def plain_samples() -> list[list[PlainSample]]:
    """Micro-batches that cover what layouts can get wrong: several images, one tile only, text only, odd counts."""
    rng = np.random.default_rng(5)

    def text(length: int, is_target: bool = False) -> TextRun:
        return TextRun(rng.integers(5, 1000, length).tolist(), is_target)

    def image(num_tiles: int) -> ImageRun:
        pictures = num_tiles + (num_tiles > 1)
        tiles = torch.from_numpy(rng.integers(0, 256, (pictures, 3, 56, 56), dtype=np.uint8))
        return ImageRun(tiles, [rng.integers(5, 1000, 2 + number % 2).tolist() for number in range(pictures)])

    two_images = PlainSample((text(5), image(3), text(4), image(2), text(3), text(6, True)))
    only_text = PlainSample((text(7), text(5, True)))
    one_tile = PlainSample((image(1), text(3), text(4, True), text(2), text(3, True)))
    return [[two_images, only_text], [only_text], [one_tile], [only_text, one_tile, two_images]]


def assemble_plain(sample: PlainSample, variant: str) -> AssembledSample:
    """Through the package's own layout."""
    pieces: list[TextPiece | ImagePiece] = []
    layouts = []
    for run in sample.runs:
        if isinstance(run, TextRun):
            pieces.append(TextPiece(run.ids, run.is_target))
        elif isinstance(run, ImageRun):
            pieces.append(ImagePiece(len(layouts)))
            layouts.append(lay_out_image(run.tag_ids, VARIANTS[variant], VISION.tokens_per_tile))
    return assemble(pieces, layouts)


def tiles_of(samples: list[PlainSample]) -> torch.Tensor:
    tiles = [run.tiles for sample in samples for run in sample.runs if isinstance(run, ImageRun)]
    return torch.cat(tiles) if tiles else torch.zeros(0, 3, 56, 56, dtype=torch.uint8)


def micro_batch_of(samples: list[PlainSample], variant: str, token_multiple: int = 1) -> MicroBatch:
    return pack(
        [assemble_plain(sample, variant) for sample in samples],
        tiles_of(samples),
        [f"sample_{number}" for number in range(len(samples))],
        VISION.tokens_per_tile,
        token_multiple,
        VARIANTS[variant].needs_cross_attention,
    )

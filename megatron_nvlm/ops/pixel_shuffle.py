"""Pixel shuffle: 2x2 neighbouring patches become one token of four times the width (NVLM paper, section 4.1)."""

import torch
from torch import Tensor


def pixel_shuffle(features: Tensor) -> Tensor:
    """Join each 2x2 block of patches on the channels, in the order of the release's `ps_version` v2.

    Args:
        features: [tiles, side * side, width], patches row-major, class token removed.

    Returns:
        [tiles, (side / 2) ** 2, 4 * width], tokens row-major; channels are top-left, top-right, bottom-left,
        bottom-right.

    Raises:
        ValueError: the number of patches is not the square of an even side.
    """
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    if side * side != patches or side % 2:
        raise ValueError(f"pixel shuffle needs an even square of patches; got {patches} a tile")
    half = side // 2
    blocks = features.view(tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(tiles, half * half, 4 * width)


def source_patches(side: int) -> Tensor:
    """The four patch numbers of each output token, [(side / 2) ** 2, 4]: the rule above as a table."""
    numbers = torch.arange(side * side).view(1, side * side, 1)
    return pixel_shuffle(numbers)[0]

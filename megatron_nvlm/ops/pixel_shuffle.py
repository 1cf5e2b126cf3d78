"""Pixel shuffle: 2x2 neighbouring patches become one token of four times the width (NVLM paper, section 4.1)."""

import torch
from torch import Tensor


def pixel_shuffle(features: Tensor) -> Tensor:
    """Join each 2x2 block of patches on the channels, in the order of the release's `ps_version` v2.

    An odd grid gets zeros on the right and below first (our choice; SigLIP's grid of 27 x 27 becomes 28 x 28).

    Args:
        features: [tiles, side * side, width], patches row-major, class token removed.

    Returns:
        [tiles, ceil(side / 2) ** 2, 4 * width], tokens row-major; channels are top-left, top-right, bottom-left,
        bottom-right.

    Raises:
        ValueError: the number of patches is no square.
    """
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    if side * side != patches:
        raise ValueError(f"pixel shuffle needs a square of patches; got {patches} a tile")
    if side % 2:
        grid = features.view(tiles, side, side, width)  # [t, side, side, w]
        features, side = torch.nn.functional.pad(grid, (0, 0, 0, 1, 0, 1)), side + 1  # [t, side + 1, side + 1, w]
    half = side // 2
    blocks = features.view(tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)  # [t, half, half, 2, 2, w]
    return blocks.reshape(tiles, half * half, 4 * width)  # [t, half * half, 4 w]


def source_patches(side: int) -> Tensor:
    """The four patch numbers of each output token, [(side / 2) ** 2, 4]: the rule above as a table."""
    numbers = torch.arange(side * side).view(1, side * side, 1)  # [1, side * side, 1]
    return pixel_shuffle(numbers)[0]  # [(side / 2) ** 2, 4]

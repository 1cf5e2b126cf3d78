"""Sizes of the blocks of interval attention's kernels, by GPU and head size, and how many programs share a key block."""

from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's blocks."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the three kernels."""

    forward: Tile
    query: Tile
    key: Tile


# Head size rounded up to a power of two -> blocks, for 16-bit inputs. Of heads of 64 to 128 none spills registers on the
# GPU that it is for (a test compiles them); those of 32 and 256 have not been looked at. None has run on sm_100.
_HOPPER = {
    32: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
_AMPERE = {
    32: _HOPPER[32],
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
_BLACKWELL = {
    **_HOPPER,
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
}
TILES = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
"""By the first compute capability that takes them."""
DELTA_ROWS = 32
"""Rows of a block of the sums of output and gradient."""
WIDE_TILES = Tiles(Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1))
"""For float32, whose products are computed in float32: no tensor cores, and twice the shared memory."""

_ENOUGH_PROGRAMS = 1024
"""Some for each of a Hopper GPU's 132 multiprocessors, since their work differs."""


@cache
def capability_of(device: torch.device) -> int:
    """Compute capability, as 90 of 9.0."""
    if device.type != "cuda":  # Triton's interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles_for(head_size: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Blocks for a head size of at most 256."""
    if dtype == torch.float32:
        return WIDE_TILES
    known = max((least for least in TILES if least <= capability), default=min(TILES))
    return TILES[known][padded_head(head_size)]


def padded_head(head_size: int) -> int:
    """A power of two, at least 32, that holds the head."""
    return max(32, triton.next_power_of_2(head_size))


def parts_of_group(heads: int, programs: int) -> int:
    """In how many parts a group's query heads are summed side by side, so that the GPU has enough to do.

    Args:
        programs: those of the kernel with one part.
    """
    divisors = [parts for parts in range(1, heads + 1) if heads % parts == 0]
    return next((parts for parts in divisors if parts * programs >= _ENOUGH_PROGRAMS), heads)

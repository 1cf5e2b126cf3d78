"""Memory that loader and workers share, for tiles: pixels never pass through a pipe.

An anonymous file (memfd) that every process maps: it needs no name and no room in /dev/shm (which containers keep small),
and it is gone with the last process, however that ends. Blocks are given out in a ring, oldest first to be returned.
"""

import mmap
import os
from collections import deque

import numpy as np


class TileMemory:
    """The mapping. `descriptor` is passed to workers, which open it with `TileMemory.attach`."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = max(size, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("megatron_nvlm_tiles") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)

    @classmethod
    def attach(cls, descriptor: int) -> "TileMemory":
        """The same memory in another process."""
        return cls(os.fstat(descriptor).st_size, descriptor)

    def view(self, offset: int, tiles: int, tile_size: int) -> np.ndarray:
        """uint8 [tiles, 3, S, S] at `offset`."""
        shape = (tiles, 3, tile_size, tile_size)
        return np.frombuffer(self._map, np.uint8, int(np.prod(shape)), offset).reshape(shape)

    def close(self) -> None:
        """Give the descriptor up; the mapping stays until the last view is gone."""
        os.close(self.descriptor)


class Ring:
    """Which bytes of the memory are in use. Blocks may be freed in any order; room comes back from the oldest on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: deque[list[int]] = deque()  # [start, end, 1 if in use]
        self._at: dict[int, list[int]] = {}

    def take(self, size: int) -> int | None:
        """Start of a free block, or None if there is no room now."""
        if size > self.size:
            return None
        if not self._blocks:
            start = 0
        else:
            oldest, newest = self._blocks[0][0], self._blocks[-1][1]
            if newest > oldest:
                if newest + size <= self.size:
                    start = newest
                elif size < oldest:
                    start = 0
                else:
                    return None
            elif newest + size < oldest:
                start = newest
            else:
                return None
        block = [start, start + size, 1]
        self._blocks.append(block)
        self._at[start] = block
        return start

    def free(self, start: int) -> None:
        """Return a block."""
        self._at.pop(start)[2] = 0
        while self._blocks and not self._blocks[0][2]:
            self._blocks.popleft()

"""The order of one set: every sample once an epoch, shuffled by shard and within windows of shards.

The shards of an epoch stand in a random order; every `window_shards` of them, in that order, are a window, and the samples
of a window are shuffled among each other. So few shards are read at a time, whatever the size of the set. Shuffling is a
keyed bijection (a Feistel network walked until it lands inside), so no list of samples is kept.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 4
_MASK = 0xFFFFFFFF
_SHARDS_HELD = 1 << 16
"""Shards whose orders are held: as many epochs of a small set as have this number, and of any set at least three."""
_WINDOW_KEYS_HELD = 4096


def round_keys(*parts: int) -> tuple[int, ...]:
    """Keys of a shuffle that belong to these numbers."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return tuple(int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(_ROUNDS))


def _mix(value: int, key: int) -> int:
    """A 32-bit hash of value and key (the finaliser of MurmurHash3)."""
    value = ((value ^ key) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


def shuffled(position: int, size: int, keys: Sequence[int]) -> int:
    """The `position`-th number of a pseudo-random order of 0 .. size - 1."""
    half_bits = _half_bits(size)
    half = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & half
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & half)
        position = (left << half_bits) | right
        if position < size:
            return position


def all_shuffled(size: int, keys: Sequence[int]) -> np.ndarray:
    """`shuffled` of every position, int64 [size]."""
    half_bits = np.uint64(_half_bits(size))
    half = np.uint64((1 << int(half_bits)) - 1)
    position = np.arange(size, dtype=np.uint64)
    outside = np.ones(size, dtype=bool)
    while outside.any():
        left, right = position[outside] >> half_bits, position[outside] & half
        for key in keys:
            left, right = right, left ^ (_mix_array(right, key) & half)
        position[outside] = (left << half_bits) | right
        outside = position >= size
    return position.astype(np.int64)


def _mix_array(value: np.ndarray, key: int) -> np.ndarray:
    mask = np.uint64(_MASK)
    value = ((value ^ np.uint64(key)) * np.uint64(0x85EBCA6B)) & mask
    value = ((value ^ (value >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & mask
    return value ^ (value >> np.uint64(16))


@dataclass(frozen=True)
class _Epoch:
    """One pass: shards in their order, and where each and each window ends."""

    shards: list[int]
    shard_ends: list[int]
    window_ends: list[int]


class SetOrder:
    """The order of one set over all epochs; memory grows with its shards, not with its samples.

    Args:
        shard_sizes: samples of each shard.
        seed: numbers that the order depends on.
        window_shards: shards whose samples are shuffled among each other.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: tuple[int, ...], window_shards: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.size = int(self.sizes.sum())
        self.first = [0, *np.cumsum(self.sizes).tolist()]
        self.seed, self.window_shards = seed, window_shards
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._keys: OrderedDict[tuple[int, int], tuple[int, ...]] = OrderedDict()

    def __call__(self, taken: int) -> tuple[int, int]:
        """(epoch, number) of the set's sample after `taken` others."""
        number, position = divmod(taken, self.size)
        epoch = self._epoch(number)
        window = bisect_right(epoch.window_ends, position)
        start = epoch.window_ends[window - 1] if window else 0
        size = epoch.window_ends[window] - start
        place = start + shuffled(position - start, size, self._window_keys(number, window))
        shard_place = bisect_right(epoch.shard_ends, place, window * self.window_shards)
        before = epoch.shard_ends[shard_place - 1] if shard_place else 0
        return number, self.first[epoch.shards[shard_place]] + place - before

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            shards = all_shuffled(len(self.sizes), round_keys(*self.seed, number))
            ends = np.cumsum(self.sizes[shards])
            window_ends = [*ends[self.window_shards - 1 :: self.window_shards].tolist()]
            if not window_ends or window_ends[-1] != self.size:
                window_ends.append(self.size)
            self._epochs[number] = _Epoch(shards.tolist(), ends.tolist(), window_ends)
            if len(self._epochs) > max(3, _SHARDS_HELD // len(self.sizes)):
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _window_keys(self, epoch: int, window: int) -> tuple[int, ...]:
        if (epoch, window) not in self._keys:
            self._keys[epoch, window] = round_keys(*self.seed, epoch, window)
            if len(self._keys) > _WINDOW_KEYS_HELD:
                self._keys.popitem(last=False)
        return self._keys[epoch, window]

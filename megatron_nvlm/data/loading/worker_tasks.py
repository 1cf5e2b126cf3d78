"""What loader and worker say to each other, and how a worker answers."""

import traceback
from dataclasses import dataclass, replace

import numpy as np

from megatron_nvlm.data.loading.fetch import BadRecord, SampleRequest, fetch
from megatron_nvlm.data.loading.tile_memory import TileMemory
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.shards.remote import CacheConfig
from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class WorkerSetup:
    """First message to a worker."""

    folders: tuple[str, ...]
    cache: CacheConfig
    pipeline: SamplePipeline
    with_pixels: bool


@dataclass(frozen=True)
class Task:
    """One sample to prepare."""

    number: int
    request: SampleRequest
    offset: int
    room: int
    """Tiles that have room in the shared memory at `offset`."""


@dataclass(frozen=True)
class Done:
    """Answer to a task. A prepared sample has its tiles in the shared memory (`in_memory`) or, if that had no room, here."""

    number: int
    result: PreparedSample | BadRecord
    num_tiles: int
    in_memory: bool


@dataclass(frozen=True)
class Failed:
    """A task that ends the run: the user's mistake, or ours with its traceback."""

    message: str
    is_users: bool


def do_task(
    task: Task, sets: list[ShardSet], pipeline: SamplePipeline, memory: TileMemory, with_pixels: bool
) -> Done | Failed:
    """Prepare one sample, its tiles in the shared memory."""
    in_memory = False

    def allocate(tiles: int, tile_size: int) -> np.ndarray:
        nonlocal in_memory
        in_memory = with_pixels and 0 < tiles <= task.room
        if in_memory:
            return memory.view(task.offset, tiles, tile_size)
        return np.empty((tiles, 3, tile_size, tile_size), dtype=np.uint8)

    try:
        result = fetch(sets, pipeline, task.request, allocate)
    except UserError as error:
        return Failed(str(error), True)
    except Exception:  # whatever it is, the parent says it and stops
        return Failed(traceback.format_exc(), False)
    if isinstance(result, BadRecord):
        return Done(task.number, result, 0, False)
    num_tiles = len(result.tiles)
    if in_memory or not with_pixels:
        result = replace(result, tiles=result.tiles[:0].copy())
    return Done(task.number, result, num_tiles, in_memory)

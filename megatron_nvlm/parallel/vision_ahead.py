"""The replicated placement of the encoder: all tiles of a step, shared by all ranks of a model replica.

Before the pipeline starts, the tiles of the step's micro-batches are dealt to the tensor x pipeline ranks in equal ranges
(one tile more or less), whatever micro-batch they are of, and each rank encodes its own with a whole encoder; the loader
(data/loading/shared_decoding.py) decodes no others. The features
then go to the first stage, which projects them in the pipeline. A trainable encoder gets their gradients back after the
pipeline's last micro-batch, and encodes again: so no rank holds activations of more than `vision_tiles_at_once` tiles.

Ranges are numbered so that the tiles of one tensor-parallel rank of all stages lie side by side: features travel along the
pipeline first (to the rank of the first stage with the same tensor-parallel rank), then among the first stage's ranks.
All ranks of a replica know all tile counts, so they make the same calls, also where a rank has fewer tiles, or none.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.ops.gather_tiles import share_of
from megatron_nvlm.sequence.micro_batch import MicroBatch


def share_index(tensor_rank: int, stage: int, stages: int) -> int:
    """Which of the tensor x pipeline shares is a rank's."""
    return tensor_rank * stages + stage


class SpreadVision:
    """One step's tiles.

    Args:
        model: this rank's first chunk, which holds the encoder.
        micro_batches: those of the step, each with the tiles that are this rank's (or with all).
        device: where the encoder is.
    """

    def __init__(self, model: NVLMModel, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        self.model, self.device = model, device
        groups = model.language_model.pg_collection
        self.tensor, self.pipeline = groups.tp, groups.pp
        self.ranks = self.tensor.size() * self.pipeline.size()
        self.counts = [micro_batch.num_tiles for micro_batch in micro_batches]
        self.total = sum(self.counts)
        start, end = share_of(self.total, self.ranks, self._number(self.tensor.rank(), self.pipeline.rank()))
        self.own_tiles = self._to_pinned(_tiles_between(micro_batches, start, end))
        assert len(self.own_tiles) == end - start, "the micro-batches lack tiles of this rank's share"
        at_once = model.tiles_at_once
        most = -(-self.total // self.ranks)
        self.rounds = [(first, min(first + at_once, most)) for first in range(0, most, at_once)]
        self._features: list[Tensor] = []
        """Of each micro-batch, on the first stage; their gradients gather here."""

    def _number(self, tensor_rank: int, stage: int) -> int:
        return share_index(tensor_rank, stage, self.pipeline.size())

    def encode(self) -> list[Tensor | None]:
        """Features [t, tokens per tile, 4 v] of each micro-batch on the first stage, None on the others.

        They lie in the host's memory, since a step may have thousands of tiles; a micro-batch takes its own to the device.
        On a GPU that memory is pinned and the host never waits for it: copies both ways are in the device's queue.
        """
        whole = self._host_memory(self.total) if self.model.pre_process else None
        with self.model.vision_clock, torch.no_grad():
            for first, last in self.rounds:
                received = self._to_first_stage(self._encode_round(first, last))
                if whole is not None and received is not None:
                    self._keep(whole, received, first, last)
        if whole is None:
            return [None] * len(self.counts)
        trains = self._trains()
        self._features = [part.detach().requires_grad_(trains) for part in whole.split(self.counts)]
        return list(self._features)

    def _keep(self, whole: Tensor, received: Tensor, first: int, last: int) -> None:
        """Copy a round's features [ranks, last - first, tokens, 4 v] to their places among all of them."""
        for number, features in enumerate(received):
            start, end = share_of(self.total, self.ranks, number)
            places = whole[start + first : min(start + last, end)]
            places.copy_(features[: len(places)], non_blocking=True)

    def _host_memory(self, tiles: int) -> Tensor:
        """Room for the features of so many tiles, pinned where the encoder is on a GPU."""
        empty = self._empty()
        pinned = self.device.type == "cuda"
        return torch.empty(tiles, *empty.shape[1:], dtype=empty.dtype, pin_memory=pinned)

    def _to_pinned(self, tiles: Tensor) -> Tensor:
        return tiles.pin_memory() if self.device.type == "cuda" else tiles

    def _trains(self) -> bool:
        assert self.model.vision_model is not None
        return any(parameter.requires_grad for parameter in self.model.vision_model.parameters())

    def _encode_round(self, first: int, last: int) -> Tensor:
        """[last - first, tokens, 4 v] of this rank's tiles in that range, zeros after the last."""
        tiles = self.own_tiles[first:last]
        if len(tiles):
            features = self.model.encode_tiles(tiles.to(self.device, non_blocking=True))
        else:
            features = self._empty()
        missing = last - first - len(features)
        return torch.cat([features, features.new_zeros(missing, *features.shape[1:])]) if missing else features

    def _empty(self) -> Tensor:
        vision = self.model.vision_model
        assert vision is not None
        shape = (0, vision.preset.tokens_per_tile, vision.preset.shuffled_size)
        return torch.zeros(shape, dtype=self.model.config.params_dtype, device=self.device)

    def _to_first_stage(self, own: Tensor) -> Tensor | None:
        """One round's features of all ranks by their number, [ranks, n, tokens, 4 v]; None on later stages."""
        stages, own = self.pipeline.size(), own.contiguous()
        column = own[None]
        if stages > 1:
            first = dist.get_global_rank(self.pipeline, 0)
            parts = [torch.empty_like(own) for _ in range(stages)] if self.model.pre_process else None
            dist.gather(own, parts, dst=first, group=self.pipeline)
            if parts is None:
                return None
            column = torch.stack(parts)
        if self.tensor.size() == 1:
            return column
        everyone = column.new_empty(self.ranks, *own.shape)
        dist.all_gather_into_tensor(everyone, column, group=self.tensor)
        return everyone

    def backward(self) -> None:
        """Gradients of the encoder from those that the pipeline left at the features; every rank of a replica calls it."""
        if not self._trains():
            return
        whole = self._gradient() if self.model.pre_process else None
        for first, last in self.rounds:
            gradient = self._from_first_stage(whole, first, last)
            tiles = self.own_tiles[first:last]
            if len(tiles):
                with self.model.vision_clock:
                    features = self.model.encode_tiles(tiles.to(self.device, non_blocking=True))
                    features.backward(gradient[: len(tiles)])
                self.model.vision_clock.tiles -= len(tiles)  # counted when they were encoded first

    def _from_first_stage(self, whole: Tensor | None, first: int, last: int) -> Tensor:
        """[last - first, tokens, 4 v]: the gradient of this rank's features in that range, zeros after the last.

        Args:
            whole: gradient of all features, on the first stage.
        """
        shape = (last - first, *self._empty().shape[1:])
        own = torch.zeros(shape, dtype=self.model.config.params_dtype, device=self.device)
        stages = self.pipeline.size()
        parts = None
        if whole is not None:
            parts = [torch.zeros_like(own) for _ in range(stages)]
            for stage, part in enumerate(parts):
                start, end = share_of(self.total, self.ranks, self._number(self.tensor.rank(), stage))
                rows = whole[start + first : min(start + last, end)]
                part[: len(rows)] = rows.to(self.device)
        if stages == 1:
            assert parts is not None
            return parts[0]
        dist.scatter(own, parts, src=dist.get_global_rank(self.pipeline, 0), group=self.pipeline)
        return own

    def _gradient(self) -> Tensor:
        """Gradient of all features. It is the same on all tensor-parallel ranks, since the projector's input is."""
        if not self._features:
            return self._empty().cpu()
        return torch.cat([part.grad if part.grad is not None else torch.zeros_like(part) for part in self._features])


def _tiles_between(micro_batches: Sequence[MicroBatch], start: int, end: int) -> Tensor:
    """Tiles [start, end) of all micro-batches, counted in order, of those that the micro-batches hold."""
    found, before = [], 0
    for micro_batch in micro_batches:
        first = before + micro_batch.first_tile
        found.append(micro_batch.tiles[max(start - first, 0) : max(end - first, 0)])
        before += micro_batch.num_tiles
    return torch.cat(found)

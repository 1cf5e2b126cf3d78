"""Bytes of activations that a rank keeps for the backward pass: an estimate from sizes.

Summed is what autograd keeps with Megatron-core's layers as they are configured here: inputs of linear layers whose
weights train, queries, keys, values and output of attention (flash kernels: no score matrices), inputs of norms and of
SwiGLU, layer inputs alone under full recomputation. A test compares it with what the local backend's autograd really
keeps; with Transformer Engine it has not been measured. Small things (masks, statistics, positions) are left out, and so is
what the allocator loses to fragments.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from megatron_nvlm.accounting.flops import ModelSizes, Work
from megatron_nvlm.models.families.languages import family_of
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.initialise import ADAPTERS
from megatron_nvlm.models.padding import pad_evenly
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.ops.linear_cross_entropy import CHUNK_ELEMENTS


@dataclass(frozen=True)
class ChunkSizes:
    """A part of the pipeline: its layers, and what stands at the model's ends."""

    layers: int
    cross_attention_layers: int
    has_encoder: bool
    has_projector: bool
    has_output: bool


@dataclass(frozen=True)
class ActivationBytes:
    """Activation bytes of one micro-batch on one rank."""

    kept: int
    """From its forward to its backward pass."""
    working: int
    """For a moment, at most: a recomputed layer, the logits, or tiles in the encoder."""


@dataclass(frozen=True)
class ActivationModel:
    """Sizes by which activations are counted.

    Args:
        trainable: the parts that train.
        backend: `local` keeps its norms' inputs and results in float32; `te` has fused norms.
        micro_batches: of a step, on a replica.
    """

    sizes: ModelSizes
    parallelism: ParallelismConfig
    dtype: torch.dtype
    trainable: Collection[str]
    backend: str
    micro_batches: int = 1

    @property
    def _tensor(self) -> int:
        return self.parallelism.tensor_model_parallel_size

    @property
    def _shard(self) -> int:
        """Ranks over which rows outside attention and MLP are spread."""
        return self._tensor if self.parallelism.sequence_parallel else 1

    def chunk(self, chunk: ChunkSizes, work: Work) -> ActivationBytes:
        """A chunk's activations for a micro-batch of that work."""
        language = self.sizes.language
        residual = work.num_tokens * language.hidden_size * self.dtype.itemsize // self._shard
        layer, cross = self._layer(work), self._cross_attention(work)
        working = 0
        if self.sizes.recompute == "full":
            # A recomputed layer keeps its input and, as measured, what a trainable gate multiplies.
            gated = chunk.cross_attention_layers if self._trains("cross_attention") else 0
            kept = (chunk.layers + gated) * residual
            working = layer + (cross if chunk.cross_attention_layers else 0)
        else:
            kept = chunk.layers * layer + chunk.cross_attention_layers * cross
        if self.backend == "local":
            kept += 4 * work.num_tokens * language.head_size  # rotary frequencies of each token
        if self.sizes.variant.needs_cross_attention:
            kept += work.num_context_tokens * language.hidden_size * self.dtype.itemsize // self._shard
        if chunk.has_encoder:
            kept += 0 if self._ahead else self._encoder(self._tiles_of_a_rank(work))
            working = max(working, self._encoder_working(work))
        if chunk.has_projector:
            kept += self._projector(work)
            if self._ahead:  # a round's tiles of all ranks come together here, and then wait in the host's memory
                working = max(working, self._features(self._tiles_at_once(work) * self._ranks))
        if chunk.has_output:
            kept += self._norm(work.num_tokens * language.hidden_size, self._shard, self._trains("language_model"))
            columns = language.vocab_size // self._tensor
            weight = columns * language.hidden_size if self._trains("language_model") else 0
            # Of the tokens with a target, the gradient of their hidden states and that of the weight, made with the loss
            # (ops/linear_cross_entropy.py).
            kept += self.dtype.itemsize * (work.num_targets * language.hidden_size + weight)
            working = max(
                working, 2 * self.dtype.itemsize * min(work.num_targets * columns, CHUNK_ELEMENTS) + 4 * weight
            )
        return ActivationBytes(kept, working)

    @property
    def _ahead(self) -> bool:
        """Whether tiles are encoded before the pipeline starts."""
        return self.parallelism.vision_placement == "replicated"

    def _trains(self, part: str) -> bool:
        return part in self.trainable

    def _norm(self, elements: int, shard: int, trains: bool, output_is_kept: bool | None = None) -> int:
        """A norm's input, and its output where a linear layer after it trains (by default, where the norm does)."""
        output = self.dtype.itemsize * (trains if output_is_kept is None else output_is_kept)
        if self.backend == "te":
            return elements * (self.dtype.itemsize + output) // shard
        wide = 4 + 4 * trains  # the input and the normalised input, in float32
        return elements * (wide + output) // shard

    def _layer(self, work: Work) -> int:
        language, size, trains = self.sizes.language, self.dtype.itemsize, self._trains("language_model")
        keys, queries = language.num_query_groups * language.head_size, language.query_size
        attention = 2 * queries + 2 * keys  # queries, keys, values and output
        if self.backend == "local":
            attention += queries + keys  # queries and keys before rotation stand beside the values
        inner = trains or self._has_adapter("down_proj")
        mlp = (4 + inner) * language.ffn_hidden_size  # both halves, activated, gated; and the second layer's input
        split = work.num_tokens * size * (attention + mlp) // self._tensor
        inputs = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        norms = sum(
            self._norm(
                work.num_tokens * language.hidden_size, self._shard, trains, trains or self._has_adapter(*targets)
            )
            for targets in inputs
        )
        if family_of(language).query_key_norm:
            norms += self._norm(work.num_tokens * (queries + keys), self._tensor, trains)
        return norms + split + self._narrow(work)

    def _has_adapter(self, *targets: str) -> bool:
        lora = self.sizes.lora
        return bool(lora.rank) and self._trains(ADAPTERS) and not set(targets).isdisjoint(lora.targets)

    def _narrow(self, work: Work) -> int:
        """What stands between the two matrices of the adapters of a layer; of all tokens before a split layer."""
        lora = self.sizes.lora
        if not (lora.rank and self._trains(ADAPTERS)):
            return 0
        after = sum(target in lora.targets for target in ("o_proj", "down_proj"))
        tokens = work.num_tokens * (len(lora.targets) - after) + work.num_tokens * after // self._shard
        return self.dtype.itemsize * lora.rank * tokens

    def _cross_attention(self, work: Work) -> int:
        language, cross, size = self.sizes.language, self.sizes.cross_attention, self.dtype.itemsize
        trains = self._trains("cross_attention")
        head = language.head_size
        queries = (cross.num_attention_heads or language.num_attention_heads) * head
        keys = (cross.num_query_groups or language.num_query_groups) * head
        split = size * (work.num_tokens * 2 * queries + work.num_context_tokens * 2 * keys) // self._tensor
        rows = work.num_tokens * language.hidden_size
        gated = size * rows * trains // self._shard  # what the gate multiplies
        return self._norm(rows, self._shard, trains) + split + gated

    def _projector(self, work: Work) -> int:
        language, size = self.sizes.language, self.dtype.itemsize
        tokens = work.tiles * self.sizes.vision.tokens_per_tile
        inputs = self.sizes.vision.shuffled_size
        trains = self._trains("vision_projection")
        if not trains and not self._trains("vision_model"):
            return 0
        if self.sizes.variant.projector == "linear":
            return tokens * size * (inputs * trains + language.hidden_size)
        inner = (1 + trains) * language.ffn_hidden_size // self._tensor
        # LayerNorm keeps its input as it is, in both backends.
        return tokens * size * (inputs * (1 + trains) + inner + language.hidden_size)

    def _tiles_of_a_rank(self, work: Work) -> int:
        """Tiles that a rank encodes in a micro-batch, or in a step where they are encoded ahead."""
        if self._ahead:
            return -(-work.tiles * self.micro_batches // self._ranks)
        return work.tiles if self._split_encoder else -(-work.tiles // self._tensor)

    def _tiles_at_once(self, work: Work) -> int:
        return min(self._tiles_of_a_rank(work), self.parallelism.vision_tiles_at_once)

    @property
    def _ranks(self) -> int:
        """Ranks of a model replica."""
        return self._tensor * self.parallelism.pipeline_model_parallel_size

    @property
    def _split_encoder(self) -> bool:
        return self.parallelism.vision_placement == "tensor_parallel"

    def _encoder(self, tiles: int) -> int:
        """Bytes that the encoder keeps for a number of tiles; nothing if it is frozen."""
        if not self._trains("vision_model"):
            return 0
        vision, size = self.sizes.vision, self.dtype.itemsize
        family = vision_family_of(vision)
        ranks = self._tensor if self._split_encoder else 1
        rows = tiles * family.tower_tokens(vision)
        width = rows * vision.hidden_size
        heads = pad_evenly(vision.num_attention_heads, ranks).padded * width // vision.num_attention_heads // ranks
        norms = 2 * self._vision_norm(width) + 2 * vision.qk_norm * self._vision_norm(heads)
        # Both branches where they are scaled; queries, keys, values, output of attention; before and after the activation.
        others = size * (2 * family.has_layer_scale * width + 4 * heads + rows * 2 * vision.ffn_hidden_size // ranks)
        last = size * width * family.has_final_norm  # its input; the projector counts its output
        return vision.num_layers * (norms + others) + last

    def _vision_norm(self, elements: int) -> int:
        """A norm of a trained encoder; LayerNorm keeps its input as it is, in both backends."""
        if self.sizes.vision.normalization == "LayerNorm":
            return 2 * self.dtype.itemsize * elements
        return self._norm(elements, 1, True)

    def _features(self, tiles: int) -> int:
        """Bytes of the features of a number of tiles."""
        vision = self.sizes.vision
        return self.dtype.itemsize * tiles * vision.patches_per_tile * vision.hidden_size

    def _encoder_working(self, work: Work) -> int:
        """Tiles that pass the encoder at once, and the features of a micro-batch before and after pixel shuffle."""
        vision, size = self.sizes.vision, self.dtype.itemsize
        tiles = self._tiles_at_once(work)
        rows = tiles * vision_family_of(vision).tower_tokens(vision)
        layer = size * rows * (2 * vision.hidden_size + max(4 * vision.hidden_size, 2 * vision.ffn_hidden_size))
        return layer + (self._encoder(tiles) if self._ahead else 2 * self._features(work.tiles))


def micro_batches_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, counted in all of its chunks.

    1F1B: as many as stages from here to the end. Interleaved: core's warm-up of chunk passes, and one.
    """
    if chunks == 1:
        return min(micro_batches, stages - stage)
    passes = min(micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
    return passes / chunks

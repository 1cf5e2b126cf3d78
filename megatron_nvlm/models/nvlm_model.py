"""One pipeline stage of NVLM: vision tokens made once, put where the micro-batch says, decoded by the language model.

D, X and H are the same code: the micro-batch carries, for every decoder token and every context token, either a token or the
number of a vision token (sequence/assemble.py writes them by the variant's row of the table).
Shapes: s decoder tokens, c context tokens, h hidden, t tiles.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import IMAGENET, PixelStatistics
from megatron_nvlm.models.clocks import VisionClock
from megatron_nvlm.models.language_model import LanguageModel, TargetLosses, ragged_sequence
from megatron_nvlm.models.padding import Padding
from megatron_nvlm.models.vision_model import VisionModel
from megatron_nvlm.ops.gather_tiles import gather_tiles, share_of
from megatron_nvlm.ops.pixel_shuffle import pixel_shuffle
from megatron_nvlm.sequence.micro_batch import MicroBatch

_EXTRA_STATE = "_extra_state"
"""Name of what a module keeps beside its parameters, for PyTorch and Megatron-core."""


class NVLMModel(MegatronModule):
    """A pipeline stage; the first also holds the vision model and its projector.

    Between stages travels [s + c, 1, h] (under sequence parallelism each rank's shards of both): decoder tokens, and after
    them the context that cross-attention layers of later stages read, so that gradients return to the projector.

    Args:
        language_model: this stage's part of the decoder.
        vision_model: on the first stage, and on all where each encodes a share. vision_projection: on the first only.
        has_context: whether the variant has cross-attention (X, H).
        vision_heads: of a tensor-parallel encoder; None where each rank holds it whole.
        tiles_at_once: most tiles that pass through the encoder together.
        encodes_ahead: whether all stages encode the tiles of a step before its pipeline starts (parallel/vision_ahead.py).
        vocabulary: how its rows are filled up, where the tensor-parallel ranks do not divide them.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        vision_model: VisionModel | None,
        vision_projection: torch.nn.Module | None,
        has_context: bool,
        vision_heads: Padding | None = None,
        tiles_at_once: int = 8,
        encodes_ahead: bool = False,
        vocabulary: Padding | None = None,
    ) -> None:
        super().__init__(config=language_model.config)
        self.language_model = language_model
        self.vision_model = vision_model
        self.vision_projection = vision_projection
        self.has_context = has_context
        self.vision_heads = vision_heads
        self.tiles_at_once = tiles_at_once
        self.encodes_ahead = encodes_ahead
        self.vocabulary = vocabulary
        self.vision_clock = VisionClock()
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.payload_tokens = 0
        """Tokens of the message between stages, padding included; 0 for as many as the micro-batch has."""
        self._payload: Tensor | None = None

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that first and last stage share when embeddings are tied (core asks for it)."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous stage sent (core's schedules call it before `forward`)."""
        self._payload = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, micro_batch: MicroBatch, features: Tensor | None = None, with_loss: bool = False
    ) -> Tensor | TargetLosses:
        """This stage's output: logits [s, vocabulary / TP] on the last stage, the payload for the next one before.

        Args:
            with_loss: the last stage gives the losses of all targets instead, and projects no other token.
            features: [t, tokens per tile, 4 v] of all tiles of the micro-batch, where they are encoded already
                (`encode` or `encode_tiles`); by default the micro-batch's own tiles are encoded.
        """
        if self.pre_process:
            features = self.encode(micro_batch.tiles) if features is None else features
            hidden, context = self._embed(micro_batch, self.project(features))
        else:
            hidden, context = self._split_payload(micro_batch)
            self.language_model.set_input_tensor(hidden)
        block_kwargs: dict[str, Any] = {}
        if self.has_context:
            block_kwargs = {"context": context, "context_mask": micro_batch.context_mask()}
        output: Tensor = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden,
            packed_seq_params=ragged_sequence(micro_batch, self.config.apply_rope_fusion),
            extra_block_kwargs=block_kwargs,
        )
        if self.post_process and with_loss:
            rows = micro_batch.target_rows
            return self.language_model.loss(output, rows, micro_batch.labels.index_select(0, rows), self.vocabulary)
        if self.post_process:
            return self.logits(output)
        return self._join_payload(micro_batch, output, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [s, 1, h] of the last stage -> [s, vocabulary / TP].

        Columns that stand for no id can neither be chosen nor take a share of the softmax, and get no gradient.
        """
        logits = self.language_model.logits(hidden)
        if self.vocabulary is None:
            return logits
        first = self.language_model.pg_collection.tp.rank() * logits.shape[-1]
        columns = torch.arange(first, first + logits.shape[-1], device=logits.device)  # [vocabulary / TP]
        return logits.masked_fill(columns >= self.vocabulary.real, torch.finfo(logits.dtype).min)

    def encode(self, tiles: Tensor) -> Tensor:
        """uint8 tiles [t, 3, S, S] -> features [t, tokens per tile, 4 v], the same on all tensor-parallel ranks."""
        if tiles.shape[0] == 0:
            return tiles[:0]
        with self.vision_clock:
            return pixel_shuffle(self.encode_patches(self._normalise(tiles)))

    def project(self, features: Tensor) -> Tensor:
        """Pixel-shuffled features [t, tokens per tile, 4 v] -> vision tokens [t * tokens per tile, h]."""
        assert self.vision_projection is not None
        if features.shape[0] == 0:
            dtype, device = self.config.params_dtype, features.device
            return torch.zeros(0, self.config.hidden_size, dtype=dtype, device=device)
        projected: Tensor = self.vision_projection(features.flatten(0, 1))  # [t * tokens per tile, h]
        return projected

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """uint8 tiles [t, 3, S, S] of this rank alone -> pixel-shuffled features [t, tokens per tile, 4 v]."""
        return pixel_shuffle(self._encode_own(self._normalise(tiles)))

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [t, 3, S, S] -> patch features [t, patches, vision hidden] of all tiles on every rank.

        Each tensor-parallel rank encodes its share of the tiles, or all of them with its share of the heads.
        """
        assert self.vision_model is not None
        group = self.language_model.pg_collection.tp
        ranks = group.size()
        if ranks == 1 or self.vision_heads is not None:
            return self._encode_own(pixels)
        start, end = share_of(len(pixels), ranks, group.rank())
        if end > start:
            own = self._encode_own(pixels[start:end])
        else:  # fewer tiles than ranks; the encoder stays in the graph, so that every rank runs the same backward
            own = self.vision_model(pixels[:1])[:0]
        return gather_tiles(own, len(pixels), group)

    def _normalise(self, tiles: Tensor) -> Tensor:
        assert self.vision_model is not None
        return normalise(tiles, self.config.params_dtype, self.vision_model.family.pixels)

    def _encode_own(self, pixels: Tensor) -> Tensor:
        assert self.vision_model is not None
        self.vision_clock.tiles += len(pixels)
        parts = [self.vision_model(part) for part in pixels.split(self.tiles_at_once)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]  # [t, p, v]

    def _embed(self, micro_batch: MicroBatch, vision_tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decoder input [s, 1, h] and context [c, 1, h] (shards of both under sequence parallelism)."""
        num_tokens = len(micro_batch.tokens)
        tokens = torch.cat([micro_batch.tokens, micro_batch.context_tokens]) if self.has_context else micro_batch.tokens
        embedded = self.language_model.embedding(input_ids=tokens[None], position_ids=None)  # [s + c, 1, h]
        hidden = insert(embedded[:num_tokens], vision_tokens, micro_batch.decoder_vision_index)  # [s, 1, h]
        context = None
        if self.has_context:
            context = insert(embedded[num_tokens:], vision_tokens, micro_batch.context_vision_index)  # [c, 1, h]
        if self.config.sequence_parallel:
            group = self.language_model.pg_collection.tp
            hidden = scatter_to_sequence_parallel_region(hidden, group=group)  # [s / TP, 1, h]
            context = None if context is None else scatter_to_sequence_parallel_region(context, group=group)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # Nothing that trains stands before the decoder in this micro-batch (text only, with a frozen language model);
            # the schedule still runs its backward, so that all ranks make the same calls.
            hidden = hidden.detach().requires_grad_()
        return hidden, context

    def payload_shape(self, micro_batch: MicroBatch) -> tuple[int, int, int]:
        """Of the message between stages, where it is as long as its micro-batch."""
        tokens = len(micro_batch.tokens) + (len(micro_batch.context_tokens) if self.has_context else 0)
        return tokens // self._sequence_shards, 1, self.config.hidden_size

    def _split_payload(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        assert self._payload is not None
        shards = self._sequence_shards
        num_tokens = len(micro_batch.tokens) // shards
        if not self.has_context:
            return self._payload[:num_tokens], None
        num_context_tokens = len(micro_batch.context_tokens) // shards
        return self._payload[:num_tokens], self._payload[num_tokens : num_tokens + num_context_tokens]

    def _join_payload(self, micro_batch: MicroBatch, output: Tensor, context: Tensor | None) -> Tensor:
        """The message to the next stage: decoder tokens, context tokens and, with a fixed length, zeros."""
        parts = [output] if context is None else [output, context]
        if self.payload_tokens:
            missing = self.payload_tokens // self._sequence_shards - sum(len(part) for part in parts)
            if missing < 0:
                raise UserError(
                    f"the micro-batch of {', '.join(micro_batch.keys)} has {-missing * self._sequence_shards} tokens more "
                    f"than the {self.payload_tokens} that virtual pipeline stages send; raise "
                    "parallelism.payload_vision_tokens by as many"
                )
            parts.append(output.new_zeros(missing, *output.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else output  # [s + c, 1, h]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As Megatron-core's, of parameters alone, so that a checkpoint does not depend on the backend.

        Core's linear layers and all modules of Transformer Engine have an `_extra_state` each, for scales of 8-bit matrix
        products. In the precisions that we have it is empty; a load that asks for one that another backend did not write
        fails.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's; `_extra_state` may be there or not."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        wrong = [name for names in found for name in names if not name.endswith(_EXTRA_STATE)]
        if strict and wrong:
            raise RuntimeError(f"weights that are missing, or have no place: {', '.join(wrong)}")
        return found

    @property
    def _sequence_shards(self) -> int:
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1


def insert(embedded: Tensor, vision_tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens of `embedded` [n, 1, h], with vision token `index[i]` in place of token i wherever `index[i]` is not -1."""
    if len(vision_tokens) == 0:
        return embedded
    chosen = vision_tokens[index.clamp(min=0)][:, None].to(embedded.dtype)  # [n, 1, h]
    return torch.where((index >= 0)[:, None, None], chosen, embedded)


def normalise(tiles: Tensor, dtype: torch.dtype, statistics: PixelStatistics = IMAGENET) -> Tensor:
    """uint8 [t, 3, S, S] -> normalised pixels of `dtype` (the release's transform); floats are such already."""
    if tiles.is_floating_point():
        return tiles.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mean = torch.tensor(statistics.mean, dtype=wide, device=tiles.device).view(3, 1, 1)
    std = torch.tensor(statistics.std, dtype=wide, device=tiles.device).view(3, 1, 1)
    return ((tiles.to(wide) / 255 - mean) / std).to(dtype)

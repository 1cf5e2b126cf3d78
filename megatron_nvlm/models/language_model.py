"""The decoder: Megatron-core's GPTModel over a ragged sequence, which ends before the output layer.

Which tokens are projected onto the vocabulary is the caller's choice: tokens with a target in training, the last of a prompt
in generation. Shapes: s decoder tokens, r chosen tokens, h hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_nvlm.models.padding import Padding
from megatron_nvlm.ops.linear_cross_entropy import VocabularyPart, linear_cross_entropy, score_rows
from megatron_nvlm.sequence.micro_batch import MicroBatch


class TargetLosses(NamedTuple):
    """Cross entropies of the tokens with a target, in nats."""

    total: Tensor
    """Their sum."""
    each: Tensor
    """[r], without a gradient."""
    right: Tensor | None
    """bool [r] whether the target is the most likely token; known in evaluation only (`eval()`)."""


@dataclass
class RaggedSequence(PackedSeqParams):
    """Core's description of packed samples, with what the local backend reads so that nothing waits for the device."""

    boundaries: tuple[int, ...] = ()
    """Those of the samples, on the host."""
    position_ids: Tensor | None = None
    """[s]; None where core's rotary embedding finds positions by `cu_seqlens`."""


def ragged_sequence(micro_batch: MicroBatch, fused: bool) -> RaggedSequence:
    """The samples of a micro-batch as attention and rotary embedding take them.

    Transformer Engine has kernels for core's format `thd`. For others core's rotary embedding would read the boundaries from
    the device in each layer; with another format name it applies one frequency a token.

    Args:
        fused: whether rotary embedding and attention are Transformer Engine's.
    """
    bounds = micro_batch.boundaries
    longest = max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    return RaggedSequence(
        qkv_format="thd" if fused else "ragged",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        boundaries=bounds,
        position_ids=None if fused else micro_batch.position_ids,
    )


class LanguageModel(GPTModel):
    """GPTModel whose last stage gives hidden states; `logits` and `loss` apply the output layer."""

    def _preprocess(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """As core's, with the rotary frequencies of each token [s, 1, 1, d] where the sequence says positions."""
        made = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if not isinstance(packed_seq_params, RaggedSequence) or packed_seq_params.position_ids is None:
            return made
        hidden, frequencies, *rest = made
        return (hidden, frequencies[packed_seq_params.position_ids], *rest)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states on every stage; core would project all tokens here."""
        return hidden_states

    def logits(self, hidden: Tensor) -> Tensor:
        """[s, 1, h] (a shard under sequence parallelism) -> [s, vocabulary / TP]."""
        output: Tensor = self.output_layer(hidden, weight=self._shared_weight())[0]  # [s, 1, vocabulary / TP]
        return output[:, 0]

    def loss(self, hidden: Tensor, target_rows: Tensor, labels: Tensor, vocabulary: Padding | None) -> TargetLosses:
        """Losses of the tokens with a target.

        Args:
            hidden: [s, 1, h], a shard under sequence parallelism.
            target_rows: [r] places of the tokens. labels: [r] their ids.
            vocabulary: how its rows are filled up.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        weight = self._shared_weight()
        weight = self.output_layer.weight if weight is None else weight
        columns = len(weight)
        real = columns if vocabulary is None else min(max(vocabulary.real - group.rank() * columns, 0), columns)
        chosen = hidden[:, 0].index_select(0, target_rows)  # [r, h]
        part = VocabularyPart(group, real)
        if not self.training:
            losses, right = score_rows(chosen, weight, labels, part)
            return TargetLosses(losses.sum(), losses, right)
        return TargetLosses(*linear_cross_entropy(chosen, weight, labels, part), None)

    def _shared_weight(self) -> Tensor | None:
        """The weight of tied embeddings; None where the output layer has its own."""
        shared: Tensor | None = None
        if self.share_embeddings_and_output_weights:
            shared = self.shared_embedding_or_output_weight()
        return shared

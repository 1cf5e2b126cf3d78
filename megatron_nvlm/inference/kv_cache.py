"""Keys and values kept between the steps of an answer, of a decoder as it was built for training.

The pack of the prompts passes through the model once; each attention keeps what it computed, by sample. Then each
step passes one token per open sample, and attention reads what is kept. For that time `KeyValueCache` stands in three
places of the decoder: in the `core_attention` slots, in place of the projection of the context (whose keys and values are
the same for every step), and after the rotary module, since each token has a position of its own. What happens in a step is
this file's own attention, whatever backend the model was built with.
Shapes: r tokens of a step (o open samples, then padding), b samples of a cache, l kept tokens of its longest sample,
n query heads, g groups, d head size, s tokens of the prompts, c context tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_nvlm.models.nvlm_model import NVLMModel

ROOM = 64
"""Tokens by which a cache grows when it is full."""


class KeptTokens:
    """Keys and values of each sample, in one padded tensor [b, l, g, d] each."""

    def __init__(self, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Take tokens [starts, starts + lengths) of `key` and `value` [tokens, g, d] for each sample."""
        longest = int(lengths.max())
        position = torch.arange(longest, device=key.device)
        self.lengths = lengths
        # After the end of a sample stands some other token, which no query sees.
        rows = (starts[:, None] + position).clamp(max=max(len(key) - 1, 0))
        self.key, self.value = key[rows], value[rows]

    def append(self, key: Tensor, value: Tensor) -> None:
        """One token more of each sample, [b, g, d]."""
        if int(self.lengths.max()) == self.key.shape[1]:
            self.key, self.value = (pad(kept, (0, 0, 0, 0, 0, ROOM)) for kept in (self.key, self.value))
        sample = torch.arange(len(key), device=key.device)
        self.key[sample, self.lengths], self.value[sample, self.lengths] = key, value
        self.lengths = self.lengths + 1

    def keep(self, samples: Tensor) -> None:
        """Forget all samples but these, by their place."""
        self.key, self.value, self.lengths = self.key[samples], self.value[samples], self.lengths[samples]

    def attend(self, query: Tensor, scale: float | None) -> Tensor:
        """[b, n, d] -> [b, n, d]: each query sees all tokens of its sample; zero where there are none."""
        longest = int(self.lengths.max())
        if longest == 0:
            return torch.zeros_like(query)
        position = torch.arange(longest, device=query.device)
        empty = self.lengths == 0
        seen = (position < self.lengths[:, None]) | empty[:, None]  # a softmax over nothing would give NaN
        output = scaled_dot_product_attention(
            query[:, :, None],
            self.key[:, :longest].transpose(1, 2),
            self.value[:, :longest].transpose(1, 2),
            attn_mask=seen[:, None, None],
            scale=scale,
            enable_gqa=query.shape[1] != self.key.shape[2],
        )[:, :, 0]
        return output.masked_fill(empty[:, None, None], 0)


class _Attention(torch.nn.Module):
    """Stands in a `core_attention` slot: computes as before while the prompts pass, then from what it kept."""

    def __init__(self, attention: Any, cache: "KeyValueCache") -> None:
        super().__init__()
        self.inner = attention.core_attention
        self.scale = attention.config.softmax_scale
        self.grows = attention.attention_type == "self"
        self.cache = cache
        self.kept: KeptTokens | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The prompts' tokens [s, n, d] (or [s, 1, n, d]), or a step's [r, 1, n, d] -> tokens of n * d."""
        if self.kept is None:
            starts, lengths = self.cache.own_tokens if self.grows else self.cache.num_context_tokens
            rows = key.shape[0]
            self.kept = KeptTokens(
                key.view(rows, *key.shape[-2:]), value.view(rows, *value.shape[-2:]), starts, lengths
            )
            output: Tensor = self.inner(query, key, value, *args, **kwargs)
            return output
        open_samples = len(self.kept.lengths)
        if self.grows:
            self.kept.append(key[:open_samples, 0], value[:open_samples, 0])
        found = self.kept.attend(query[:open_samples, 0], self.scale).flatten(1)
        return pad(found, (0, 0, 0, len(query) - open_samples))[:, None]


class _ContextProjection(torch.nn.Module):
    """Stands for the projection of the context to keys and values, which are kept: gives none in a step."""

    def __init__(self, projection: torch.nn.Module) -> None:
        super().__init__()
        self.inner = projection
        self.width = 0

    def forward(self, context: Tensor) -> tuple[Tensor, None]:
        """[c, 1, h] -> [c, 1, 2 g d] of the prompts; [0, 1, 2 g d] in a step."""
        if self.width:
            return context.new_zeros(0, 1, self.width), None
        projected, _ = self.inner(context)
        self.width = projected.shape[-1]
        return projected, None


class KeyValueCache:
    """What the decoder layers of one pipeline stage keep of some samples.

    Args:
        cu_seqlens: [samples + 1 or more] boundaries of the samples in the prompts' sequence.
        context_intervals: [s, 2] as in the micro-batch; a new token sees what the last token of its sample sees.
        num_samples: without the sample that padding is.
    """

    def __init__(self, model: NVLMModel, cu_seqlens: Tensor, context_intervals: Tensor, num_samples: int) -> None:
        boundaries = cu_seqlens[: num_samples + 1].long()
        self.last_tokens = boundaries[1:] - 1
        self.own_tokens = (boundaries[:-1], boundaries[1:] - boundaries[:-1])
        start, end = context_intervals[self.last_tokens].long().unbind(1)
        self.num_context_tokens = (start, (end - start).clamp(min=0))
        self.positions = self.own_tokens[1]
        """[o] position of the next token of each open sample."""
        self._model = model.language_model
        self._attentions: list[_Attention] = []
        self._step_positions: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The decoder keeps and reads; as it was before, after."""
        replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

        def replace(owner: Any, name: str, stand_in: torch.nn.Module) -> None:
            replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stand_in.eval())

        hook = self._model.rotary_pos_emb.register_forward_hook(self._rotary)
        try:
            for layer in self._model.decoder.layers:
                attentions = [layer.self_attention]
                if hasattr(layer.cross_attention, "linear_kv"):
                    attentions.append(layer.cross_attention)
                    replace(layer.cross_attention, "linear_kv", _ContextProjection(layer.cross_attention.linear_kv))
                for attention in attentions:
                    stand_in = _Attention(attention, self)
                    self._attentions.append(stand_in)
                    replace(attention, "core_attention", stand_in)
            yield
        finally:
            hook.remove()
            for owner, name, module in reversed(replaced):
                setattr(owner, name, module)

    def keep(self, samples: Tensor) -> None:
        """Go on with these of the open samples, by their place."""
        self.positions = self.positions[samples]
        for attention in self._attentions:
            assert attention.kept is not None
            attention.kept.keep(samples)

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Around the decoder's pass over a step's tokens, padding included."""
        self._step_positions = pad(self.positions, (0, num_tokens - len(self.positions)))
        yield
        self._step_positions = None
        self.positions = self.positions + 1

    def _rotary(self, rotary: Any, arguments: Any, output: Tensor) -> Tensor:
        """After core's rotary module: frequencies [r, 1, 1, d] of the tokens' own positions, instead of 0, 1, 2, ..."""
        if self._step_positions is None:
            return output
        frequencies: Tensor = rotary.get_emb(int(self._step_positions.max()) + 1)
        return frequencies[self._step_positions]

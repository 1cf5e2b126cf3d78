"""Attention dropout drops weights in training alone, in self-attention and in cross-attention, and keeps their mean."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nvlm.models.backends import IntervalCoreAttention, TorchCoreAttention

TOKENS, HEADS, GROUPS, SIZE, DRAWS = 6, 4, 2, 8, 3000
CONFIG = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, attention_dropout=0.5)


def inputs(*batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shape = (TOKENS, *batch)
    return tuple(torch.randn(*shape, heads, SIZE, generator=generator) for heads in (HEADS, GROUPS, GROUPS))


def packed(boundaries: list[int]) -> tuple[torch.nn.Module, dict[str, object]]:
    layer = TorchCoreAttention(CONFIG, 1, AttnMaskType.causal, "self")
    return layer, {"attention_mask": None, "packed_seq_params": SimpleNamespace(boundaries=boundaries)}


FORMS = {
    "one sample": (lambda: packed([0, TOKENS]), (1,)),
    "two samples": (lambda: packed([0, 3, TOKENS]), (1,)),
    "tiles": (lambda: (TorchCoreAttention(CONFIG, 1, AttnMaskType.no_mask, "self"), {"attention_mask": None}), (2,)),
    "cross-attention": (
        lambda: (IntervalCoreAttention(CONFIG), {"attention_mask": torch.tensor([[0, 0], [0, 3], *[[1, 6]] * 4])}),
        (1,),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_dropped_in_training_alone(form: str) -> None:
    make, batch = FORMS[form]
    layer, rest = make()
    given = inputs(*batch)
    layer.eval()
    whole = layer(*given, **rest)
    assert torch.equal(whole, layer(*given, **rest))
    layer.train()
    torch.manual_seed(1)
    draws = torch.stack([layer(*given, **rest) for _ in range(DRAWS)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / DRAWS**0.5
    assert ((draws.mean(0) - whole).abs() <= 6 * error + 1e-6).all()

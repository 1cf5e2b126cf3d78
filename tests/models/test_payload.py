"""The message between pipeline stages, where it has one length."""

import dataclasses

import pytest
import torch

from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.device import Device
from tests.support.batches import Draw
from tests.support.tiny import micro_batch_of, tiny_config, tiny_model


def test_a_message_is_filled_up_and_one_that_is_too_long_says_by_how_much(world_of_one: Device) -> None:
    model = tiny_model(tiny_config("x"), world_of_one)
    micro_batch = dataclasses.replace(micro_batch_of([Draw(1).picture(2)], "x"), keys=("sample_7", "sample_8"))
    rows, num_context_tokens = len(micro_batch.tokens), len(micro_batch.context_tokens)
    hidden, context = torch.ones(rows, 1, 8), torch.ones(num_context_tokens, 1, 8)
    model.payload_tokens = rows + num_context_tokens + 5
    message = model._join_payload(micro_batch, hidden, context)
    assert message.shape == (rows + num_context_tokens + 5, 1, 8)
    assert message[-5:].abs().sum() == 0
    model.set_input_tensor(message)
    taken, taken_context = model._split_payload(micro_batch)
    assert taken_context is not None
    assert torch.equal(taken, hidden) and torch.equal(taken_context, context)
    model.payload_tokens = rows + num_context_tokens - 3
    with pytest.raises(UserError, match="of sample_7, sample_8 has 3 tokens more than the .* by as many"):
        model._join_payload(micro_batch, hidden, context)

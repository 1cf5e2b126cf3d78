"""A chat completion in OpenAI's form over a network: the request as a sample and settings, and the answer's JSON.

A request may bring pictures as data URLs alone: paths would read files of the server for whoever asks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_nvlm.data.building.forms import to_question
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.decoding import GeneratedAnswer, token_logprobs
from megatron_nvlm.inference.openai_request import read_settings
from megatron_nvlm.inference.questions import make_sample
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.text.tokenizer import Tokenizer


def read_completion_request(body: Mapping[str, Any], seed: int) -> tuple[RawSample, Sampling]:
    """The conversation that is to be answered, and how. What the body does not set is as in `Sampling`: greedy.

    Args:
        seed: where the body has none.

    Raises:
        UserError: it asks for what is not possible, or is no question.
    """
    if body.get("messages") is None:
        raise UserError("the request has no 'messages'")
    sampling = dataclasses.replace(Sampling(seed=seed), **read_settings(body))
    turns, images = to_question({"messages": body["messages"]})
    if turns[-1]["from"] != "human":
        raise UserError("the last of 'messages' is not of the user, so there is nothing to answer")
    held = [image for image in images if isinstance(image, bytes)]
    if len(held) < len(images):
        raise UserError("a picture of 'messages' is no data URL (data:image/png;base64,...), which alone is read here")
    return make_sample("request", turns, held), sampling


def completion(
    found: GeneratedAnswer, prompt_tokens: int, tokenizer: Tokenizer, with_logprobs: bool, names: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer as a chat completion.

    Args:
        prompt_tokens: decoder tokens of the question, those of its tiles included where they stand in the decoder.
        names: `id`, `created` and `model`.
    """
    logprobs = {"content": token_logprobs(found, tokenizer)} if with_logprobs else None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": found.text},
        "logprobs": logprobs,
        "finish_reason": "stop" if found.is_complete else "length",
    }
    written = len(found.tokens)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
    return {**names, "object": "chat.completion", "choices": [choice], "usage": usage}

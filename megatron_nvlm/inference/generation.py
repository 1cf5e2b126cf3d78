"""Answers with a key/value cache: the prompts pass through the model once, then one token per open sample and step.

Gives the tokens that reading the whole sequence again for each would give. Works under tensor, sequence and pipeline
parallelism; every rank of a model replica calls it with the same samples and gets the same answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn.functional import pad

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.inference.kv_cache import KeyValueCache
from megatron_nvlm.inference.pipeline_pass import from_last_stage, pass_through
from megatron_nvlm.inference.sampling import GREEDY, Sampling, TokenChooser, gather_vocabulary
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.sequence.micro_batch import MicroBatch

OnLogits = Callable[[list[int], Tensor], None]
"""Told the numbers of the open samples and their logits [o, vocabulary], on the last stage."""


@torch.no_grad()
def generate(
    model: NVLMModel,
    samples: Sequence[PreparedSample],
    pipeline: SamplePipeline,
    stop_id: int,
    max_new_tokens: int,
    token_multiple: int = 1,
    sampling: Sampling = GREEDY,
    on_logits: OnLogits | None = None,
) -> list[list[int]]:
    """Answer several samples at once.

    Args:
        model: this rank's pipeline stage, in evaluation mode.
        samples: prepared with `open_answer`.
        stop_id: token that ends an answer; not part of it.
        token_multiple: tokens are padded to a multiple of it, as in `pack`.

    Returns:
        New ids of each sample, at most `max_new_tokens`.
    """
    answers: list[list[int]] = [[] for _ in samples]
    if not samples or max_new_tokens < 1:
        return answers
    device = next(model.parameters()).device
    micro_batch = build_micro_batch(samples, pipeline, token_multiple).to(device)
    cache = KeyValueCache(model, micro_batch.cu_seqlens, micro_batch.context_intervals, len(samples))
    chooser = TokenChooser(sampling, [sample.key for sample in samples])
    open_samples = list(range(len(samples)))
    with cache.installed():
        logits = _read_prompts(model, micro_batch, cache, token_multiple)
        while True:
            tokens = _choose(model, logits, open_samples, chooser, on_logits)
            goes_on = []
            for place, (sample, token) in enumerate(zip(open_samples, tokens, strict=True)):
                if token == stop_id:
                    continue
                answers[sample].append(token)
                if len(answers[sample]) < max_new_tokens:
                    goes_on.append(place)
            if not goes_on:
                return answers
            if len(goes_on) < len(open_samples):
                cache.keep(torch.tensor(goes_on, device=device))
                open_samples = [open_samples[place] for place in goes_on]
            logits = _read_tokens(model, [tokens[place] for place in goes_on], cache, token_multiple)


def _read_prompts(
    model: NVLMModel, micro_batch: MicroBatch, cache: KeyValueCache, token_multiple: int
) -> Tensor | None:
    """Logits [samples, vocabulary / TP] of each sample's last token, on the last stage."""
    last_tokens = cache.last_tokens

    def last_tokens_only(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: logits of whole prompts would take more memory than all else."""
        hidden = arguments[0]
        group = model.language_model.pg_collection.tp
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        hidden = pad(hidden[last_tokens], (0, 0, 0, 0, 0, -len(last_tokens) % token_multiple))
        if model.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=group)
        return (hidden, *arguments[1:])

    def compute(message: Tensor | None) -> Tensor:
        model.set_input_tensor(message)
        output: Tensor = model(micro_batch)
        return output

    hook = None
    if model.post_process:
        hook = model.language_model.output_layer.register_forward_pre_hook(last_tokens_only)
    try:
        num_tokens = len(micro_batch.tokens) + (len(micro_batch.context_tokens) if model.has_context else 0)
        output = pass_through(model, num_tokens, compute)
    finally:
        if hook is not None:
            hook.remove()
    return None if output is None else output[: len(last_tokens)]


def _read_tokens(model: NVLMModel, tokens: list[int], cache: KeyValueCache, token_multiple: int) -> Tensor | None:
    """Logits [open samples, vocabulary / TP] after one token more of each, on the last stage."""
    num_tokens = len(tokens) + -len(tokens) % token_multiple
    language = model.language_model

    def compute(message: Tensor | None) -> Tensor:
        if message is None:
            device = next(model.parameters()).device
            ids = torch.tensor(tokens + [0] * (num_tokens - len(tokens)), dtype=torch.int64, device=device)
            message = language.embedding(input_ids=ids[None], position_ids=None)
            if model.config.sequence_parallel:
                message = scatter_to_sequence_parallel_region(message, group=language.pg_collection.tp)
        else:
            language.set_input_tensor(message)
        kwargs = {"context": message, "context_mask": None} if model.has_context else {}  # keys and values are kept
        with cache.step(num_tokens):
            output: Tensor = language(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=message,
                extra_block_kwargs=kwargs,
            )
        return model.without_padding(output[0]) if model.post_process else output

    output = pass_through(model, num_tokens, compute)
    return None if output is None else output[: len(tokens)]


def _choose(
    model: NVLMModel, logits: Tensor | None, open_samples: list[int], chooser: TokenChooser, on_logits: OnLogits | None
) -> list[int]:
    """One token of each open sample, the same on every rank."""
    tokens = None
    if logits is not None:
        whole = gather_vocabulary(logits, model.language_model.pg_collection.tp)
        if on_logits is not None:
            on_logits(open_samples, whole)
        tokens = chooser.choose(whole, open_samples)
    return from_last_stage(model, tokens, len(open_samples))

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
from megatron_nvlm.inference.beam_search import BeamSearch
from megatron_nvlm.inference.decoding import Decoding, GeneratedAnswer, TokenByToken
from megatron_nvlm.inference.kv_cache import KeyValueCache
from megatron_nvlm.inference.pipeline_pass import from_last_stage, pass_through
from megatron_nvlm.inference.sampling import GREEDY, Sampling, TokenChooser, gather_vocabulary
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.sequence.micro_batch import MicroBatch

OnLogits = Callable[[Tensor], None]
"""Told the logits [open rows, vocabulary] of each step, on the last stage."""


@torch.no_grad()
def generate(
    model: NVLMModel,
    samples: Sequence[PreparedSample],
    pipeline: SamplePipeline,
    stop_id: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    token_multiple: int = 1,
    on_logits: OnLogits | None = None,
) -> list[GeneratedAnswer]:
    """Answer several samples at once.

    Args:
        model: this rank's pipeline stage, in evaluation mode.
        samples: prepared with `open_answer`.
        stop_id: token that ends an answer; not part of it.
        sampling: of all samples, or one for each; beam search for all of them or for none.
        token_multiple: tokens are padded to a multiple of it, as in `pack`.
    """
    if not samples:
        return []
    samplings = [sampling] * len(samples) if isinstance(sampling, Sampling) else sampling
    device = next(model.parameters()).device
    micro_batch = build_micro_batch(samples, pipeline, token_multiple).to(device)
    cache = KeyValueCache(model, micro_batch.cu_seqlens, micro_batch.context_intervals, len(samples))
    decoding = _start_decoding(samples, samplings, stop_id, pipeline)
    rows = list(range(len(samples)))
    with cache.installed():
        logits = _read_prompts(model, micro_batch, cache, token_multiple)
        while True:
            step = None
            if logits is not None:
                whole = gather_vocabulary(logits, model.language_model.pg_collection.tp)
                if on_logits is not None:
                    on_logits(whole)
                step = decoding.advance(whole)
            step = from_last_stage(model, step)
            if not step.places:
                return from_last_stage(model, None if logits is None else decoding.answers())
            if step.places != rows:
                cache.keep(torch.tensor(step.places, device=device))
                rows = list(range(len(step.places)))
            logits = _read_tokens(model, step.tokens, cache, token_multiple)


def _start_decoding(
    samples: Sequence[PreparedSample],
    samplings: Sequence[Sampling],
    stop_id: int,
    pipeline: SamplePipeline,
) -> Decoding:
    """What chooses the tokens."""
    prompts = [sample.sequence.tokens[sample.sequence.decoder_vision_index < 0].tolist() for sample in samples]
    if samplings[0].beams > 1:
        return BeamSearch(samplings, prompts, stop_id, pipeline.tokenizer)
    chooser = TokenChooser(samplings, [sample.key for sample in samples], prompts, stop_id)
    return TokenByToken(chooser, pipeline.tokenizer)


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
        return model.logits(output) if model.post_process else output

    output = pass_through(model, num_tokens, compute)
    return None if output is None else output[: len(tokens)]

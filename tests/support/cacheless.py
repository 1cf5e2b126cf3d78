"""Greedy answers in the plain form that inference/generation.py is compared with: no cache, the whole row for each token."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.inference.sampling import gather_vocabulary
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.sequence.assemble import IGNORED_LABEL, AssembledSample


@torch.no_grad()
def generate(
    model: NVLMModel,
    samples: Sequence[PreparedSample],
    pipeline: SamplePipeline,
    stop_id: int,
    max_new_tokens: int,
    token_multiple: int = 1,
) -> list[list[int]]:
    """The likeliest next token, again and again, for several samples at once.

    Every rank of the tensor-parallel group calls it with the same samples and gets the same answers.

    Args:
        model: whole in depth (one pipeline stage), in evaluation mode. Its tiles are encoded once.
        samples: prepared with `open_answer`.
        stop_id: token that ends an answer; not part of it.
        token_multiple: as in `pack`.

    Returns:
        New ids of each sample, at most `max_new_tokens`.
    """
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in samples]
    open_samples = list(range(len(samples)))
    rows = [sample.sequence for sample in samples]
    features: Tensor | None = None
    for _ in range(max_new_tokens):
        # Finished samples stay in the row, so that vision tokens keep their numbers.
        current = [dataclasses.replace(sample, sequence=row) for sample, row in zip(samples, rows, strict=True)]
        micro_batch = build_micro_batch(current, pipeline, token_multiple).to(device)
        if features is None:
            features = model.encode(micro_batch.tiles)
        logits = model(micro_batch, features)
        last_tokens = micro_batch.cu_seqlens[1 : len(samples) + 1].long() - 1
        chosen = gather_vocabulary(logits[last_tokens], model.language_model.pg_collection.tp).argmax(-1).tolist()
        for sample in list(open_samples):
            if chosen[sample] == stop_id:
                open_samples.remove(sample)
                continue
            answers[sample].append(chosen[sample])
            rows[sample] = append_token(rows[sample], chosen[sample])
        if not open_samples:
            break
    return answers


def append_token(rows: AssembledSample, token: int) -> AssembledSample:
    """The sample with one text row more, which sees in the context what the last row sees."""
    return dataclasses.replace(
        rows,
        tokens=np.append(rows.tokens, token),
        labels=np.append(rows.labels, IGNORED_LABEL),
        loss_mask=np.append(rows.loss_mask, np.float32(0)),
        decoder_vision_index=np.append(rows.decoder_vision_index, -1),
        context_intervals=np.concatenate([rows.context_intervals, rows.context_intervals[-1:]]),
    )

"""Answers of a trained run to prepared samples."""

from collections.abc import Sequence

from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.inference.generation import generate
from megatron_nvlm.inference.sampling import GREEDY, Sampling
from megatron_nvlm.runs.restore import TrainedRun
from megatron_nvlm.text.conversation import TEMPLATES


def answer(
    trained: TrainedRun, samples: Sequence[PreparedSample], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[str]:
    """Texts for samples prepared with `open_answer`; every rank of a model replica calls it alike."""
    tokenizer = trained.pipeline.tokenizer
    stop_id = tokenizer.special_id(TEMPLATES[trained.run.data.template].turn_end)
    token_multiple = trained.run.parallelism.token_multiple
    ids = generate(trained.model, samples, trained.pipeline, stop_id, max_new_tokens, token_multiple, sampling)
    return [tokenizer.decode(found) for found in ids]

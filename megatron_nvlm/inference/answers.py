"""Answers of a trained run to prepared samples."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.inference.decoding import GeneratedAnswer
from megatron_nvlm.inference.generation import generate
from megatron_nvlm.inference.sampling import GREEDY, Sampling
from megatron_nvlm.runs.restore import TrainedRun
from megatron_nvlm.text.conversation import find_template


def generate_answers(
    trained: TrainedRun,
    samples: Sequence[PreparedSample],
    sampling: Sampling | Sequence[Sampling] = GREEDY,
) -> list[GeneratedAnswer]:
    """Answers to samples prepared with `open_answer`; every rank of a model replica calls it alike.

    Args:
        sampling: of all samples, or one for each.
    """
    form = find_template(trained.run.data.template)
    stop_id = trained.pipeline.tokenizer.special_id(form.turn_end)
    token_multiple = trained.run.parallelism.token_multiple
    answers = generate(trained.model, samples, trained.pipeline, stop_id, sampling, token_multiple)
    lead = form.roles["assistant"].lead  # the model writes it, and the template puts it before what is said already
    return [replace(found, text=found.text.removeprefix(lead)) for found in answers]


def answer(trained: TrainedRun, samples: Sequence[PreparedSample], sampling: Sampling = GREEDY) -> list[str]:
    """As `generate_answers`, the texts alone."""
    return [found.text for found in generate_answers(trained, samples, sampling)]

"""Options of sampling, against transformers' own logits processors; stop strings that tokens split; log-probabilities."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from megatron_nvlm.inference.decoding import TokenByToken, token_logprobs
from megatron_nvlm.inference.generation import generate
from megatron_nvlm.inference.sampling import ChosenToken, Sampling, TokenChooser, change_scores, draw
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.inference.test_generation import LAYOUTS, pipeline_of, prepared
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, tiny_model

VOCABULARY, STOP = 40, 7


def theirs_of(sampling: Sampling, prompt: int) -> LogitsProcessorList:
    """What transformers' `generate` makes of the same settings, in its order."""
    return LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            theirs.MinNewTokensLengthLogitsProcessor(prompt, sampling.min_new_tokens, STOP),
            theirs.TemperatureLogitsWarper(sampling.temperature),
            theirs.TopKLogitsWarper(sampling.top_k),
            theirs.TopPLogitsWarper(sampling.top_p),
        ]
    )


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(1, VOCABULARY + 2),
    top_p=st.floats(0.05, 1),
    penalty=st.floats(0.3, 3),
    least=st.integers(0, 4),
    written=st.integers(0, 4),
)
def test_shares_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float, least: int, written: int
) -> None:
    """Evenly spread numbers draw each token as often as its probability after transformers' processors."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    seen = torch.randint(VOCABULARY, (5 + written,), generator=generator)
    sampling = Sampling(temperature, top_p, top_k=top_k, repetition_penalty=penalty, min_new_tokens=least)
    left = theirs_of(sampling, 5)(seen[None], logits[None].clone())[0]
    count = 2000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    changed = change_scores(logits, sampling, seen.tolist(), written, STOP)
    shares = torch.bincount(draw(changed.expand(count, -1), sampling, uniform), minlength=VOCABULARY) / count
    torch.testing.assert_close(shares.double(), left.softmax(0), atol=2 / count, rtol=0)


def test_greedy_under_penalty_and_least_length() -> None:
    """The chooser itself remembers what it wrote."""
    sampling = Sampling(repetition_penalty=1.7, min_new_tokens=3)
    chooser = TokenChooser([sampling], ["a"], [[3, 4]], STOP)
    generator, ids = torch.Generator().manual_seed(2), [3, 4]
    processors = theirs_of(dataclasses.replace(sampling, temperature=1.0, top_k=VOCABULARY), 2)
    for _ in range(8):
        logits = torch.randn(1, VOCABULARY, generator=generator, dtype=torch.float64)
        logits[0, [STOP, 3]] += 3
        expected = int(processors(torch.tensor([ids]), logits.clone()).argmax())
        assert chooser.choose(logits, [0]) == [ChosenToken(expected)]
        ids.append(expected)
    assert STOP not in ids[2:5] and STOP in ids


def forced(tokenizer: Tokenizer, sampling: Sampling, ids: list[int]) -> TokenByToken:
    """A decoding whose logits want these tokens, advanced until it ends."""
    decoding = TokenByToken(TokenChooser([sampling], ["a"], stop_id=0), tokenizer)
    for token in [*ids, 0]:
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, token] = 9
        if not decoding.advance(logits).places:
            break
    return decoding


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "one <b>two</b>"),
        (("two",), "one <b>"),
        (("absent", "e <"), "on"),
        (("</b>", "<b>"), "one "),
        (("b>t", " <"), "one"),
        (("one",), ""),
    ],
)
def test_stop_strings(stop: tuple[str, ...], text: str) -> None:
    """Byte by byte, so that every stop string is split."""
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    ids = [token for letter in "one <b>two</b>" for token in tokenizer.encode(letter)]
    (found,) = forced(tokenizer, Sampling(stop=stop), ids).answers()
    assert found.text == text and found.is_complete
    assert tokenizer.decode(found.ids) == text


def test_a_token_that_holds_more_than_the_stop_string() -> None:
    tokenizer = Tokenizer(qwen2_tokenizer(1000))
    token = next(token for token in range(256, 1000) if len(tokenizer.decode([token]).strip()) > 2)
    word = tokenizer.decode([token])
    (found,) = forced(tokenizer, Sampling(stop=(word[1:2],)), [5, token]).answers()
    assert found.text == tokenizer.decode([5]) + word[:1] and found.ids == [5, token]


def test_the_most_tokens_are_no_end() -> None:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    (found,) = forced(tokenizer, Sampling(max_new_tokens=2), [70, 71, 72]).answers()
    assert found.ids == [70, 71] and not found.is_complete


EVERYTHING = [
    Sampling(1.0, 0.9, 4, 6, 50, 1.3, 3, logprobs=2),
    Sampling(max_new_tokens=6, repetition_penalty=2.0, logprobs=0),
    Sampling(0.8, max_new_tokens=3, stop=("e", "a")),
    Sampling(max_new_tokens=6),
    Sampling(1.5, seed=9, max_new_tokens=5, top_k=3, logprobs=1),
]


def everything_on_rank(parallelism: ParallelismConfig) -> list[list[tuple[list[int], str, list[float | None]]]]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    return [everything_of(variant, device, parallelism) for variant in ("d", "h")]


def everything_of(
    variant: str, device: Device, parallelism: ParallelismConfig, alone: bool = False
) -> list[tuple[list[int], str, list[float | None]]]:
    """Ids, text and rounded log-probabilities of each sample, by its own settings."""
    model = tiny_model(tiny_config(variant), device, parallelism).eval()
    samples, pipeline = prepared(variant), pipeline_of(variant)
    batches = [[number] for number in range(len(samples))] if alone else [list(range(len(samples)))]
    found = []
    for batch in batches:
        some, samplings = [samples[number] for number in batch], [EVERYTHING[number] for number in batch]
        found += generate(model, some, pipeline, -1, samplings, parallelism.token_multiple)
    told = []
    for answer in found:
        numbers = [token.logprob for token in answer.tokens] + [
            logprob for token in answer.tokens for _, logprob in token.alternatives
        ]
        told.append((answer.ids, answer.text, [None if number is None else round(number, 6) for number in numbers]))
    return told


def test_each_has_its_own_settings_in_a_batch(world_of_one: Device) -> None:
    together = everything_of("h", world_of_one, ParallelismConfig())
    assert together == everything_of("h", world_of_one, ParallelismConfig(), alone=True)
    assert [len(numbers) for _, _, numbers in together][0] == 6 * 3 and together[3][2] == [None] * 6


@pytest.mark.distributed
def test_layouts_give_the_same_answers(world_of_one: Device) -> None:
    """Vocabulary, sequence and stages split."""
    expected = [everything_of(variant, world_of_one, ParallelismConfig()) for variant in ("d", "h")]
    ranks, split = LAYOUTS["TP2 x PP2"]
    for found in run_ranks(ranks, everything_on_rank, split):
        assert found == expected


def test_logprobs_are_those_of_unchanged_logits() -> None:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(0.5, max_new_tokens=1, top_k=2, repetition_penalty=3.0, logprobs=3)
    decoding = TokenByToken(TokenChooser([sampling], ["a"], [[1, 2]]), tokenizer)
    decoding.advance(logits)
    (told,) = token_logprobs(decoding.answers()[0], tokenizer)
    expected = logits[0].double().log_softmax(0)
    assert told["logprob"] == float(expected[told["id"]]) and told["token"] == tokenizer.token_text(told["id"])
    values, ids = expected.topk(3)
    assert [(other["id"], other["logprob"]) for other in told["top_logprobs"]] == list(
        zip(ids.tolist(), values.tolist(), strict=True)
    )

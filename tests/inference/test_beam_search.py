"""Beam search: the answers of transformers' `generate(num_beams=N)` on the exported folder, and the same under layouts."""

from typing import Any

import pytest
import torch

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.beam_search import BeamSearch
from megatron_nvlm.inference.generation import generate
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.hf.folders import PROMPTS, pipeline_of
from tests.hf.test_model import Pair, make_pair
from tests.inference.test_generation import LAYOUTS
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, tiny_model

NEW_TOKENS = 7
SETTINGS = {
    "two": dict(beams=2),
    "long answers": dict(beams=4, length_penalty=2.0, early_stopping=True),
    "short answers": dict(beams=3, length_penalty=-1.5),
    "penalty and least length": dict(beams=3, repetition_penalty=1.4, min_new_tokens=3),
    "early": dict(beams=3, early_stopping=True),
}


@pytest.fixture(scope="module", params=["d", "h"])
def pair(request: pytest.FixtureRequest, world_of_one: Device, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("beams") / "folder", tiny_config(request.param), world_of_one)


def beams_of(pair: Pair, stop_id: int, settings: dict[str, Any], batch: list[str]) -> list[list[int]]:
    pipeline = pipeline_of(pair.variant)
    samples = [PROMPTS[name].prepare(pipeline) for name in batch]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, **settings)
    return [answer.ids for answer in generate(pair.ours, samples, pipeline, stop_id, sampling)]


def theirs_of(pair: Pair, name: str, stop_id: int, settings: dict[str, Any]) -> list[int]:
    inputs = pair.inputs([PROMPTS[name]])
    options = {"num_beams" if key == "beams" else key: value for key, value in settings.items()}
    ids = pair.theirs.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stop_id, pad_token_id=0, **options
    )[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_those_of_transformers(pair: Pair, name: str) -> None:
    """With an end token that beams do come to; several samples at once as each alone."""
    settings, prompts = SETTINGS[name], ["text only", "six tiles", "two turns"]
    free = beams_of(pair, -1, {"beams": 2}, prompts)
    lengths = set()
    for stop_id in {free[0][1], free[1][2], free[2][4]}:
        expected = [theirs_of(pair, prompt, stop_id, settings) for prompt in prompts]
        assert beams_of(pair, stop_id, settings, prompts) == expected
        assert [beams_of(pair, stop_id, settings, [prompt])[0] for prompt in prompts] == expected
        lengths |= {len(answer) for answer in expected}
    assert len(lengths) > 1 or (pair.variant, name) != ("d", "two")  # beams do end before the most tokens


def test_beams_find_more_than_greed(pair: Pair) -> None:
    prompts = list(PROMPTS)
    assert beams_of(pair, -1, {"beams": 4}, prompts) != beams_of(pair, -1, {}, prompts)


def answers_of(variant: str, device: Device, parallelism: ParallelismConfig) -> list[list[int]]:
    model = tiny_model(tiny_config(variant), device, parallelism).eval()
    pipeline = pipeline_of(variant)
    samples = [prompt.prepare(pipeline) for prompt in PROMPTS.values()]
    sampling = Sampling(max_new_tokens=4, beams=3)
    return [answer.ids for answer in generate(model, samples, pipeline, 9, sampling, parallelism.token_multiple)]


def answers_on_rank(parallelism: ParallelismConfig) -> dict[str, list[list[int]]]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    return {variant: answers_of(variant, device, parallelism) for variant in ("d", "x")}


@pytest.mark.distributed
def test_layouts_give_the_same_answers(world_of_one: Device) -> None:
    """Vocabulary, sequence and stages split."""
    expected = {variant: answers_of(variant, world_of_one, ParallelismConfig()) for variant in ("d", "x")}
    ranks, split = LAYOUTS["TP2 x PP2"]
    for found in run_ranks(ranks, answers_on_rank, split):
        assert found == expected


def test_a_stop_string_ends_a_beam() -> None:
    """An answer of beams is cut before it, and its tokens are as many as the text needs."""
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    ends = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        search = BeamSearch([Sampling(max_new_tokens=8, beams=3, stop=("e", "a"))], [[]], 0, tokenizer)
        rows = 1
        while rows:
            logits = torch.full((rows, tokenizer.vocab_size), -9.0)
            logits[:, 65:75] = torch.randn(rows, 10, generator=generator)  # letters, with the stop strings among them
            rows = len(search.advance(logits).places)
        (found,) = search.answers()
        assert not {"e", "a"} & set(found.text) and tokenizer.decode(found.ids) == found.text
        ends.append(found.is_complete)
    assert any(ends)


@pytest.mark.parametrize(
    "settings",
    [dict(beams=2, temperature=0.5), dict(beams=2, logprobs=1), dict(length_penalty=2.0), dict(early_stopping=True)],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="beam"):
        Sampling(**settings)

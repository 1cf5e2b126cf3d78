"""Generation with a key/value cache: each step's logits are those of a fresh forward pass, under every layout."""

import dataclasses

import pytest
import torch

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.inference.generation import generate
from megatron_nvlm.inference.sampling import GREEDY, Sampling
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support import cacheless
from tests.support.batches import Draw
from tests.support.ranks import run_ranks
from tests.support.tiny import PlainSample, assemble_plain, tiles_of, tiny_config, tiny_model

NEW_TOKENS = 6
draw = Draw(11)
PROMPTS: dict[str, list[PlainSample]] = {
    "text only": [draw.words()],
    "one tile": [draw.picture(1)],
    "six tiles": [draw.picture(6)],
    "two images": [draw.two_pictures()],
    "ragged": [draw.words(), draw.picture(6), draw.picture(1), draw.two_pictures(), draw.picture(3)],
}
VARIANT_NAMES = ("d", "x", "h")


def pipeline_of(variant: str) -> SamplePipeline:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    return SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS[variant], 4, 512, "chatml", None)


def prepared(variant: str, prompts: str = "ragged") -> list[PreparedSample]:
    return [
        PreparedSample(str(number), assemble_plain(sample, variant), tiles_of([sample]).numpy(), "test")
        for number, sample in enumerate(PROMPTS[prompts])
    ]


def answers_of(
    variant: str,
    device: Device,
    parallelism: ParallelismConfig,
    stop_id: int = -1,
    sampling: Sampling = GREEDY,
    prompts: str = "ragged",
) -> list[list[int]]:
    model = tiny_model(tiny_config(variant), device, parallelism).eval()
    samples = prepared(variant, prompts)
    sampling = dataclasses.replace(sampling, max_new_tokens=NEW_TOKENS)
    found = generate(model, samples, pipeline_of(variant), stop_id, sampling, parallelism.token_multiple)
    return [answer.ids for answer in found]


def answers_on_rank(parallelism: ParallelismConfig, sampling: Sampling, stop_id: int) -> dict[str, list[list[int]]]:
    device = use_device()
    start_groups(parallelism, device, seed=1)
    return {variant: answers_of(variant, device, parallelism, stop_id, sampling) for variant in VARIANT_NAMES}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_each_step_equals_a_fresh_forward_pass(world_of_one: Device, variant: str, prompts: str) -> None:
    model = tiny_model(tiny_config(variant, qk_norm=True), world_of_one, dtype=torch.float32).eval()
    pipeline, samples = pipeline_of(variant), prepared(variant, prompts)
    cached: list[torch.Tensor] = []
    found = generate(model, samples, pipeline, -1, Sampling(max_new_tokens=NEW_TOKENS), 1, cached.append)
    answers = [answer.ids for answer in found]
    assert answers == cacheless.generate(model, samples, pipeline, -1, NEW_TOKENS)
    assert len(cached) == NEW_TOKENS
    for step in range(NEW_TOKENS):
        longer = []
        for sample, answer in zip(samples, answers, strict=True):
            rows = sample.sequence
            for token in answer[:step]:
                rows = cacheless.append_token(rows, token)
            longer.append(dataclasses.replace(sample, sequence=rows))
        micro_batch = build_micro_batch(longer, pipeline)
        with torch.no_grad():
            fresh = model(micro_batch)[micro_batch.cu_seqlens[1:].long() - 1]
        torch.testing.assert_close(cached[step], fresh, atol=5e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_samples_end_by_themselves(world_of_one: Device, variant: str) -> None:
    """The cache forgets samples that are done; the others go on as if nothing had happened."""
    free = answers_of(variant, world_of_one, ParallelismConfig())
    stop = free[1][2]
    stopped = answers_of(variant, world_of_one, ParallelismConfig(), stop_id=stop)
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len({len(answer) for answer in stopped}) > 1


def test_the_model_is_as_it_was(world_of_one: Device) -> None:
    model = tiny_model(tiny_config("h"), world_of_one).eval()
    modules = {name: type(module) for name, module in model.named_modules()}
    generate(model, prepared("h"), pipeline_of("h"), -1, Sampling(max_new_tokens=2))
    assert {name: type(module) for name, module in model.named_modules()} == modules


LAYOUTS = {
    "TP2": (2, ParallelismConfig(tensor_model_parallel_size=2)),
    "TP2 with sequence parallelism": (2, ParallelismConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, ParallelismConfig(pipeline_model_parallel_size=2)),
    "PP4": (4, ParallelismConfig(pipeline_model_parallel_size=4)),
    "PP2, uneven": (2, ParallelismConfig(pipeline_model_parallel_size=2, pipeline_layout="Et|t*3L")),
    "TP2 x PP2": (
        4,
        ParallelismConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            sequence_parallel=True,
            vision_placement="replicated",
        ),
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("PP4", "PP2, uneven") else name for name in LAYOUTS]
)
def test_layouts_give_the_same_answers(world_of_one: Device, name: str) -> None:
    """Greedy and drawn, on every rank; with a stop token, so that the number of open samples becomes odd."""
    ranks, parallelism = LAYOUTS[name]
    stop = answers_of("h", world_of_one, ParallelismConfig())[1][2]
    for sampling in (GREEDY, Sampling(temperature=1.0, top_p=0.9, seed=4)):
        expected = {
            variant: answers_of(variant, world_of_one, ParallelismConfig(), stop, sampling) for variant in VARIANT_NAMES
        }
        for found in run_ranks(ranks, answers_on_rank, parallelism, sampling, stop):
            assert found == expected

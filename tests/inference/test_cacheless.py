"""The cacheless reference: its tokens are those of a fresh forward pass of the independent plain form."""

import pytest

from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.cacheless import generate
from tests.support.plain_nvlm import PlainConfig, forward
from tests.support.tiny import PlainSample, TextRun, assemble_plain, plain_samples, tiles_of, tiny_config, tiny_model

NEW_TOKENS = 4


def pipeline_of(variant: str) -> SamplePipeline:
    tokenizer = Tokenizer(qwen2_tokenizer(300))
    return SamplePipeline(tokenizer, TilingConfig(tile_size=56), VARIANTS[variant], 4, 512, "chatml", None)


def prepared(variant: str) -> list[PreparedSample]:
    return [
        PreparedSample(str(number), assemble_plain(sample, variant), tiles_of([sample]).numpy(), "test")
        for number, sample in enumerate(plain_samples()[-1])
    ]


def answers_of(variant: str, device: Device, parallelism: ParallelismConfig, stop_id: int = -1) -> list[list[int]]:
    model = tiny_model(tiny_config(variant), device, parallelism).eval()
    return generate(model, prepared(variant), pipeline_of(variant), stop_id, NEW_TOKENS, parallelism.token_multiple)


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_equals_the_plain_form_token_by_token(world_of_one: Device, variant: str) -> None:
    answers = answers_of(variant, world_of_one, ParallelismConfig())
    model = tiny_model(tiny_config(variant), world_of_one)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for sample, answer in zip(plain_samples()[-1], answers, strict=True):
        runs, expected = sample.runs, []
        for _ in range(NEW_TOKENS):
            logits, _ = forward(weights, PlainSample((*runs, TextRun(expected, False))), PlainConfig(variant))
            expected.append(int(logits[-1].argmax()))
        assert answer == expected


def test_an_answer_ends_before_the_stop_token(world_of_one: Device) -> None:
    free = answers_of("h", world_of_one, ParallelismConfig())
    stop = free[0][2]
    stopped = answers_of("h", world_of_one, ParallelismConfig(), stop_id=stop)
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert stopped[0] == free[0][: free[0].index(stop)]

"""The FLOP model against torch's FLOP counter on the demo's models, and against the paper's Table 3 in order."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_nvlm.accounting.flops import (
    Flops,
    ModelSizes,
    Work,
    attention,
    by_component,
    count_flops,
    count_work,
    linear,
    whole_model,
)
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.models.config import resolve_model
from megatron_nvlm.models.families.visions import VISION_PRESETS
from megatron_nvlm.models.lora import TARGETS, LoraConfig
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.training.step import loss_function
from megatron_nvlm.training.trainable import COMPONENTS, RECIPES, freeze
from tests.support.paper import TABLE_3_ROWS, paper_sizes
from tests.support.tiny import VISION, micro_batch_of, plain_samples, tiny_config, tiny_model

TOLERANCE = 0.02
(TWO_IMAGES, ONLY_TEXT), _, (ONE_TILE,), _ = plain_samples()
BATCHES = {
    "two images": [TWO_IMAGES],
    "two samples": [TWO_IMAGES, TWO_IMAGES],
    "text": [ONLY_TEXT],
    "one tile": [ONE_TILE],
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("trainable", [COMPONENTS, RECIPES["sft"], RECIPES["pretrain"]], ids=["all", "sft", "pretrain"])
@pytest.mark.parametrize("variant", "dxh")
def test_counted_operations(variant: str, trainable: tuple[str, ...], recompute: str, world_of_one: Device) -> None:
    """The counter sees no fused attention on a CPU, so attention runs as matrix products; it counts whole score matrices,
    masked or not, and so does the model with `dense_attention`. Recomputed operations it counts again."""
    config = dataclasses.replace(tiny_config(variant), recompute=recompute)
    model = tiny_model(config, world_of_one)
    freeze(model, trainable)
    parts = resolve_model(config)
    sizes = ModelSizes(parts.variant, parts.language, parts.vision, config.cross_attention, recompute)
    for name, samples in BATCHES.items():
        micro_batch = micro_batch_of(samples, variant)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(micro_batch, with_loss=True)
            forward = counter.get_total_flops()
            loss_function(micro_batch, output)[0].backward()
        work = count_work(micro_batch, VISION.tokens_per_tile, dense_attention=True)
        flops = count_flops(sizes, work, trainable)
        expected = whole_model(sizes, flops)
        # The output layer's gradients are made in the forward pass, while its logits are there.
        at_once = flops.output_layer.input_gradient + flops.output_layer.weight_gradient
        assert expected.forward + at_once == pytest.approx(forward, rel=TOLERANCE), name
        assert expected.executed == pytest.approx(counter.get_total_flops(), rel=TOLERANCE), name


@pytest.mark.parametrize("variant", "dxh")
def test_counted_operations_of_siglip(variant: str, world_of_one: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ten more layers cost in training; tiles of 70 pixels are 25 patches, and 9 tokens after pixel shuffle."""
    config = dataclasses.replace(tiny_config(variant), vision="tiny_siglip")
    preset, real, expected = VISION_PRESETS["tiny_siglip"], [], []
    assert preset.tokens_per_tile == 9
    for layers in (2, 12):
        monkeypatch.setitem(VISION_PRESETS, "tiny_siglip", dataclasses.replace(preset, num_layers=layers))
        model = tiny_model(config, world_of_one)
        parts = resolve_model(config)
        sizes = ModelSizes(parts.variant, parts.language, parts.vision, config.cross_attention, "none")
        micro_batch = make_micro_batch(SampleShape(96, 3, 2), parts.variant, 9, 1)
        micro_batch = dataclasses.replace(micro_batch, tiles=torch.zeros(4, 3, 70, 70, dtype=torch.uint8))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_function(micro_batch, model(micro_batch, with_loss=True))[0].backward()
        work = count_work(micro_batch, 9, dense_attention=True)
        real.append(counter.get_total_flops())
        expected.append(whole_model(sizes, count_flops(sizes, work, COMPONENTS)).executed)
    assert expected[1] == pytest.approx(real[1], rel=TOLERANCE)
    assert expected[1] - expected[0] == pytest.approx(real[1] - real[0], rel=0.002)


@pytest.mark.parametrize("targets", [list(TARGETS), ["k_proj", "o_proj"]], ids=["all", "some"])
def test_counted_operations_of_adapters(targets: list[str], world_of_one: Device) -> None:
    """What adapters add to a model whose language model is frozen."""
    real, expected = [], []
    for lora, trainable in (
        (LoraConfig(), RECIPES["pretrain"]),
        (LoraConfig(16, targets=targets), (*RECIPES["pretrain"], "lora")),
    ):
        config = dataclasses.replace(tiny_config("h"), lora=lora)
        model = tiny_model(config, world_of_one)
        freeze(model, trainable)
        parts = resolve_model(config)
        sizes = ModelSizes(parts.variant, parts.language, parts.vision, config.cross_attention, "none", lora=lora)
        micro_batch = micro_batch_of([TWO_IMAGES], "h")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_function(micro_batch, model(micro_batch, with_loss=True))[0].backward()
        real.append(counter.get_total_flops())
        work = count_work(micro_batch, VISION.tokens_per_tile, dense_attention=True)
        expected.append(whole_model(sizes, count_flops(sizes, work, trainable)).executed)
    assert expected[1] == pytest.approx(real[1], rel=TOLERANCE)
    assert expected[1] - expected[0] == pytest.approx(real[1] - real[0], rel=0.02) and real[1] > real[0]


def test_real_work_is_less_than_dense() -> None:
    for variant in "dxh":
        micro_batch = micro_batch_of([TWO_IMAGES], variant)
        real = count_work(micro_batch, VISION.tokens_per_tile)
        dense = count_work(micro_batch, VISION.tokens_per_tile, dense_attention=True)
        assert real.self_pairs == real.num_tokens * (real.num_tokens + 1) // 2 < dense.self_pairs
        assert real.context_pairs <= dense.context_pairs
        assert (real.num_tokens, real.num_context_tokens, real.tiles) == (
            dense.num_tokens,
            dense.num_context_tokens,
            dense.tiles,
        )
        assert real.tiles == 7


def test_padding_is_no_work() -> None:
    for variant in "dxh":
        real = count_work(micro_batch_of([TWO_IMAGES, ONLY_TEXT], variant), VISION.tokens_per_tile)
        assert count_work(micro_batch_of([TWO_IMAGES, ONLY_TEXT], variant, 64), VISION.tokens_per_tile) == real


def test_frozen_weights_have_no_gradient() -> None:
    assert linear(3, 5, 7, trains=False) == Flops(210, 210, 0)
    assert linear(3, 5, 7, trains=True, input_has_gradient=False) == Flops(210, 0, 210)
    assert attention(10, 4) == Flops(160, 320)
    sizes = paper_sizes("h")
    micro_batch = make_micro_batch(SampleShape(1280, 6, 5), sizes.variant, 256, 1)
    flops = count_flops(sizes, count_work(micro_batch, 256), RECIPES["sft"])
    assert flops.vision.input_gradient == flops.vision.weight_gradient == 0
    assert flops.decoder_layer.weight_gradient > 0
    frozen = count_flops(sizes, count_work(micro_batch, 256), RECIPES["pretrain"])
    assert frozen.decoder_layer.weight_gradient == frozen.output_layer.weight_gradient == 0
    assert frozen.cross_attention == flops.cross_attention


@pytest.mark.parametrize("trainable", [RECIPES["pretrain"], ("vision_projection",)], ids=["pretrain", "projector"])
def test_needless_operations(trainable: tuple[str, ...], world_of_one: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining of X runs the frozen decoder backward below its first cross-attention layer. A model that does not, made
    by cutting the decoder's input off, does exactly what is counted as needed."""
    config = tiny_config("x")
    model = tiny_model(config, world_of_one)
    freeze(model, trainable)
    embed = NVLMModel._embed

    def cut(self: NVLMModel, *args: Any) -> Any:
        hidden, context = embed(self, *args)
        return hidden.detach(), context

    parts = resolve_model(config)
    sizes = ModelSizes(parts.variant, parts.language, parts.vision, config.cross_attention, "none")
    micro_batch = micro_batch_of([TWO_IMAGES], "x")
    flops = whole_model(
        sizes, count_flops(sizes, count_work(micro_batch, VISION.tokens_per_tile, dense_attention=True), trainable)
    )
    counted = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_function(micro_batch, model(micro_batch, with_loss=True))[0].backward()
        counted.append(counter.get_total_flops())
        monkeypatch.setattr(NVLMModel, "_embed", cut)
    assert min(sizes.cross_attention_layers) == 1
    # A linear layer of core's that trains makes the gradient of its input though nobody asks: here that of queries.
    queries = parts.language.query_size
    unasked = 2 * len(micro_batch.tokens) * parts.language.hidden_size * queries * ("cross_attention" in trainable)
    assert flops.needless == counted[0] - counted[1] + unasked
    assert flops.model == pytest.approx(counted[1], rel=TOLERANCE)
    assert flops.executed == pytest.approx(counted[0], rel=TOLERANCE)


def test_only_a_decoder_that_begins_with_what_needs_no_gradient_is_run_backward_needlessly() -> None:
    for variant, trainable, has_needless in (
        ("x", RECIPES["pretrain"], True),
        ("x", RECIPES["sft"], False),
        ("x", (*RECIPES["pretrain"], "lora"), False),
        ("h", RECIPES["pretrain"], False),  # the thumbnail stands in the decoder, behind the projector
        ("h", ("cross_attention",), True),
        ("d", RECIPES["pretrain"], False),
    ):
        sizes = paper_sizes(variant)
        work = count_work(make_micro_batch(SampleShape(1280, 1, 5), sizes.variant, 256, 1), 256)
        flops = whole_model(sizes, count_flops(sizes, work, trainable))
        assert (flops.needless > 0) is has_needless, (variant, trainable)
        assert flops.executed == flops.forward + flops.input_gradient + flops.weight_gradient + flops.needless


COUNTS = st.integers(0, 10**6)
WORK = st.builds(Work, COUNTS, COUNTS, COUNTS, COUNTS, st.integers(0, 100), COUNTS)


@given(WORK, WORK, st.sampled_from("dxh"), st.sampled_from(["none", "selective", "full"]))
def test_operations_of_a_step_are_those_of_its_work_added_up(
    one: Work, other: Work, variant: str, recompute: str
) -> None:
    sizes = paper_sizes(variant, recompute)
    for trainable in (RECIPES["pretrain"], RECIPES["sft"], COMPONENTS):
        apart = [whole_model(sizes, count_flops(sizes, work, trainable)) for work in (one, other)]
        together = count_flops(sizes, one + other, trainable)
        assert whole_model(sizes, together) == apart[0] + apart[1]
        assert sum(part.executed for part in by_component(sizes, together).values()) == (apart[0] + apart[1]).executed
        assert whole_model(sizes, together).executed >= whole_model(sizes, together).model >= 0


def test_order_of_the_papers_table_3() -> None:
    """X needs least for a sample, then H, then D, as the paper's samples per second say (50.6, 36.2, 28.8)."""
    per_sample = {}
    for variant, rows in TABLE_3_ROWS.items():
        sizes = paper_sizes(variant)
        work = count_work(make_micro_batch(SampleShape(rows, 6, 5), sizes.variant, 256, 1), 256)
        assert (work.num_tokens, work.tiles) == (rows, 7)
        per_sample[variant] = whole_model(sizes, count_flops(sizes, work, RECIPES["sft"])).model
    assert per_sample["x"] < per_sample["h"] < per_sample["d"]
    # 6 operations a weight and row (all decoder weights but the embedding train), the usual rule, within its own error
    language = 34_388_917_248 - 64000 * 7168
    vision = 2 * 7 * 1025 * 5.5e9
    assert per_sample["d"] == pytest.approx(6 * 2816 * language + vision, rel=0.05)

"""The transformers model computes what the Megatron model does: logits and greedy answers on the same weights."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.hf.exported_code.modeling_nvlm import NVLM_D_Model, NVLM_H_Model, NVLM_X_Model, NVLMModel
from megatron_nvlm.hf.exported_code.processing_nvlm import NVLMProcessor
from megatron_nvlm.models.config import ModelConfig
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families import visions as presets
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import LANGUAGE_PRESETS
from megatron_nvlm.models.families.rope_scaling import LLAMA3, YARN, RopeScaling
from megatron_nvlm.models.nvlm_model import NVLMModel as MegatronModel
from megatron_nvlm.parallel.device import Device
from tests.hf.folders import PROMPTS, VARIANT_NAMES, Prompt, pipeline_of, rows_of, write_folder
from tests.hf.processors import load_processor
from tests.support.cacheless import generate
from tests.support.tiny import tiny_config, tiny_model

CLASSES = {"d": NVLM_D_Model, "x": NVLM_X_Model, "h": NVLM_H_Model}
ABSOLUTE = 5e-5
NEW_TOKENS = 5
BATCHES = {**{name: [prompt] for name, prompt in PROMPTS.items()}, "ragged batch": list(PROMPTS.values())}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A Megatron model and its exported folder, opened."""

    variant: str
    ours: MegatronModel
    theirs: NVLMModel
    processor: NVLMProcessor
    folder: Path

    def our_logits(self, prompts: list[Prompt]) -> Tensor:
        pipeline = pipeline_of(self.variant)
        micro_batch = build_micro_batch([prompt.prepare(pipeline) for prompt in prompts], pipeline)
        with torch.no_grad():
            return self.ours(micro_batch)

    def inputs(self, prompts: list[Prompt], **options: Any) -> Any:
        images = [prompt.images for prompt in prompts]
        return self.processor([*images] if any(images) else None, [prompt.messages for prompt in prompts], **options)


def make_pair(folder: Path, config: ModelConfig, device: Device, dtype: torch.dtype = torch.float64) -> Pair:
    ours = tiny_model(config, device, dtype=dtype).eval()
    write_folder(folder, ours, config)
    theirs = CLASSES[config.variant].from_pretrained(folder, dtype=dtype).eval()
    return Pair(config.variant, ours, theirs, load_processor(folder), folder)


@pytest.fixture(scope="module", params=VARIANT_NAMES)
def pair(
    request: pytest.FixtureRequest, world_of_one: Device, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("exported") / request.param
    yield make_pair(folder, tiny_config(request.param), world_of_one)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_logits(pair: Pair, name: str, padding_side: str) -> None:
    prompts = BATCHES[name]
    inputs = pair.inputs(prompts, padding_side=padding_side)
    with torch.no_grad():
        logits = pair.theirs(**inputs).logits
    assert bool(logits.isfinite().all())
    expected = pair.our_logits(prompts)
    torch.testing.assert_close(rows_of(logits, inputs["attention_mask"]), expected, rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("name", list(BATCHES))
def test_greedy_answers(pair: Pair, name: str) -> None:
    prompts = BATCHES[name]
    pipeline = pipeline_of(pair.variant)
    samples = [prompt.prepare(pipeline) for prompt in prompts]
    free = generate(pair.ours, samples, pipeline, -1, NEW_TOKENS)
    assert answers_of(pair, prompts, eos_token_id=None) == free
    stop = free[0][2]
    stopped = answers_of(pair, prompts, eos_token_id=stop)
    assert [answer[: answer.index(stop)] if stop in answer else answer for answer in stopped] == generate(
        pair.ours, samples, pipeline, stop, NEW_TOKENS
    )


def answers_of(pair: Pair, prompts: list[Prompt], **options: Any) -> list[list[int]]:
    inputs = pair.inputs(prompts)
    ids = pair.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    prompt_ids = inputs["input_ids"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
    assert torch.equal(ids[:, : prompt_ids.shape[1]], prompt_ids)
    return ids[:, prompt_ids.shape[1] :].tolist()


def test_a_cache_changes_nothing_and_saves_work(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder runs once, context keys and values are made once a layer, and a step reads one row."""
    prompts = BATCHES["ragged batch"]
    calls: dict[str, int] = {}
    rows: list[int] = []

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    language = pair.theirs.language_model.model
    crossed = [layer.cross_attn for layer in language.layers if layer.has_cross_attention]
    hooks = [pair.theirs.vision_model.register_forward_hook(count("encoder"))]
    hooks += [attention.k_proj.register_forward_hook(count("context")) for attention in crossed]
    hooks.append(language.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1])))
    cached = answers_of(pair, prompts, eos_token_id=None)
    for hook in hooks:
        hook.remove()
    tiles = sum(len(prompt.prepare(pipeline_of(pair.variant)).tiles) for prompt in prompts)
    assert calls["encoder"] == -(-tiles // 8)
    assert calls.get("context", 0) == len(crossed) == (0 if pair.variant == "d" else 2)
    assert rows == [pair.inputs(prompts)["input_ids"].shape[1], *[1] * (NEW_TOKENS - 1)]
    assert answers_of(pair, prompts, eos_token_id=None, use_cache=False) == cached


def test_beams_and_several_answers_keep_to_their_own_images(pair: Pair) -> None:
    """A batch of beams gives what each prompt gives alone."""
    prompts = [PROMPTS["six tiles"], PROMPTS["text only"], PROMPTS["two images"]]
    options: dict[str, Any] = dict(eos_token_id=None, num_beams=3, num_return_sequences=2)
    together = answers_of(pair, prompts, **options)
    alone = [answer for prompt in prompts for answer in answers_of(pair, [prompt], **options)]
    assert together == alone


def test_the_loss_is_the_mean_over_shifted_labels(pair: Pair) -> None:
    prompts = BATCHES["ragged batch"]
    inputs = pair.inputs(prompts, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    with torch.no_grad():
        output = pair.theirs(**inputs, labels=labels)
    likelihood = output.logits.log_softmax(-1)
    losses = [
        -likelihood[sample, row - 1, label]
        for sample, own in enumerate(labels)
        for row, label in enumerate(own.tolist())
        if label != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_rows_before_the_first_image_do_not_see_it(pair: Pair) -> None:
    prompt = PROMPTS["six tiles"]
    inputs = pair.inputs([prompt])
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    with torch.no_grad():
        logits, other = pair.theirs(**inputs).logits[0], pair.theirs(**changed).logits[0]
    differs = (logits != other).any(-1)
    first = int(differs.nonzero()[0])
    assert bool(differs[first:].all())
    before = pair.processor.tokenizer.decode(inputs["input_ids"][0, :first])
    assert before.endswith("<Image>") or pair.variant != "x"
    assert "Look: <Image>" in before


@pytest.mark.parametrize("variant", ["x", "h"])
def test_normed_heads_and_own_groups(world_of_one: Device, tmp_path: Path, variant: str) -> None:
    """Cross-attention with query/key norm and with other heads and groups than self-attention; layers by an offset."""
    cross = CrossAttentionConfig(interval=3, offset=1, num_attention_heads=8, num_query_groups=4, qk_norm=True)
    config = dataclasses.replace(tiny_config(variant), cross_attention=cross)
    pair = make_pair(tmp_path / "folder", config, world_of_one)
    assert pair.theirs.config.cross_attention["layers"] == [1]
    test_logits(pair, "ragged batch", "left")


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_llama_tied_and_the_other_encoder(
    world_of_one: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """No biases, tied embeddings, and InternViT of the 300M family: LayerNorm and biases, no query/key norm."""
    language = dataclasses.replace(LANGUAGE_PRESETS["tiny"], family="llama", tied_embeddings=True)
    vision = dataclasses.replace(
        presets.VISION_PRESETS["tiny"], normalization="LayerNorm", qk_norm=False, qkv_bias=True
    )
    monkeypatch.setitem(LANGUAGE_PRESETS, "other", language)
    monkeypatch.setitem(presets.VISION_PRESETS, "other", vision)
    config = dataclasses.replace(tiny_config(variant), language="other", vision="other")
    pair = make_pair(tmp_path / "folder", config, world_of_one)
    assert not hasattr(pair.theirs.language_model, "lm_head")
    test_logits(pair, "ragged batch", "left")


# A row for each family, with what it alone has.
FAMILIES: dict[str, LanguagePreset] = {
    "llama 3.1": dataclasses.replace(
        LANGUAGE_PRESETS["tiny"], family="llama", rope_scaling=RopeScaling(LLAMA3, 8.0, 16, 1.0, 4.0)
    ),
    "qwen2 with yarn": dataclasses.replace(LANGUAGE_PRESETS["tiny"], rope_scaling=RopeScaling(YARN, 4.0, 16)),
    "mistral": dataclasses.replace(LANGUAGE_PRESETS["tiny"], family="mistral", kv_channels=48),
    "qwen3": LANGUAGE_PRESETS["tiny_qwen3"],
}


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(
    world_of_one: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, variant: str
) -> None:
    """Logits, and answers with a cache of keys and values."""
    monkeypatch.setitem(LANGUAGE_PRESETS, "other", FAMILIES[family])
    pair = make_pair(tmp_path / "folder", dataclasses.replace(tiny_config(variant), language="other"), world_of_one)
    test_logits(pair, "ragged batch", "left")
    prompts = [PROMPTS["two images"]]
    pipeline = pipeline_of(variant)
    expected = generate(pair.ours, [prompt.prepare(pipeline) for prompt in prompts], pipeline, -1, NEW_TOKENS)
    assert answers_of(pair, prompts, eos_token_id=None) == expected


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_siglip(world_of_one: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """A grid of 3 x 3 patches of 18 pixels, filled up to 4 x 4, and two pixels of each edge that are not seen."""
    vision = dataclasses.replace(presets.VISION_PRESETS["tiny_siglip"], tile_size=56, patch_size=18)
    monkeypatch.setitem(presets.VISION_PRESETS, "other", vision)
    pair = make_pair(tmp_path / "folder", dataclasses.replace(tiny_config(variant), vision="other"), world_of_one)
    assert pair.processor.image_processor.image_mean == [0.5, 0.5, 0.5]
    test_logits(pair, "ragged batch", "left")


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_float32(world_of_one: Device, tmp_path: Path, variant: str) -> None:
    """The same within the tolerance where both round."""
    pair = make_pair(tmp_path / "folder", tiny_config(variant), world_of_one, torch.float32)
    test_logits(pair, "ragged batch", "left")


def test_inputs_that_do_not_fit_are_refused_with_a_sentence(pair: Pair) -> None:
    prompts = [PROMPTS["two images"], PROMPTS["text only"]]
    inputs, right = pair.inputs(prompts), pair.inputs(prompts, padding_side="right")
    few = {**inputs, "pixel_values": inputs["pixel_values"][:-1]}
    swapped = {**inputs, "num_tiles": inputs["num_tiles"].flip(0)}
    short = {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (pair.theirs, few, "give num_tiles as the folder's processor does"),
        (pair.theirs.generate, few, "give num_tiles as the folder's processor does"),
        (pair.theirs, swapped, "an index names vision tokens that its sample does not have"),
        (pair.theirs, short, "attention_mask has shape"),
        (pair.theirs, {**inputs, "labels": inputs["input_ids"][:, 1:]}, "labels have shape"),
        (pair.theirs.generate, right, "padded on the right"),
        (pair.theirs.generate, {**inputs, "cache_implementation": "static"}, "a cache that grows"),
    ]
    if pair.variant != "d":
        bare = {name: inputs[name] for name in ("input_ids", "pixel_values", "num_tiles", "vision_index")}
        bad.append((pair.theirs, bare, "needs context_input_ids, context_vision_index and context_intervals"))
        without = {name: value for name, value in inputs.items() if name != "pixel_values"}
        bad.append((pair.theirs, without, "context_intervals needs"))
    if pair.variant != "x":
        unsaid = {name: value for name, value in inputs.items() if name != "vision_index"}
        bad.append((pair.theirs, unsaid, "where vision tokens stand is not said"))
    for function, arguments, words in bad:
        with pytest.raises(ValueError, match=words) as caught:
            function(**arguments)
        assert "\n" not in str(caught.value)


def test_a_placeholder_says_the_places_as_well(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the release has it: no vision_index, but the id that stands where vision tokens go."""
    inputs = pair.inputs([PROMPTS["two images"], PROMPTS["text only"], PROMPTS["two turns"]])
    monkeypatch.setattr(pair.theirs, "img_context_token_id", pair.processor.img_context_token_id)
    without = {name: value for name, value in inputs.items() if name != "vision_index"}
    if pair.variant == "d":
        del without["num_tiles"]
    with torch.no_grad():
        assert torch.equal(pair.theirs(**inputs).logits, pair.theirs(**without).logits)


def test_a_conversation_goes_on_with_the_cache(pair: Pair) -> None:
    """generate with the cache of the turn before gives what it gives without."""
    first = pair.inputs([PROMPTS["one tile"]])
    once = pair.theirs.generate(
        **first, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    more = torch.cat([once["sequences"], torch.tensor([[11, 12]])], dim=1)
    added = more.shape[1] - first["input_ids"].shape[1]
    grown = {**first, "input_ids": more, "attention_mask": torch.ones_like(more)}
    grown["vision_index"] = torch.nn.functional.pad(first["vision_index"], (0, added), value=-1)
    if pair.variant != "d":
        last = first["context_intervals"][:, -1:].expand(-1, added, -1)
        grown["context_intervals"] = torch.cat([first["context_intervals"], last], dim=1)
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    expected = pair.theirs.generate(**grown, **options)
    cache = once["cache"] if "cache" in once else once["past_key_values"]
    assert torch.equal(pair.theirs.generate(**grown, cache=cache, **options), expected)

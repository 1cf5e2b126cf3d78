"""The processor gives what training's pipeline gives, token for token and bit for bit."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.companions import image_context_token_id, write_companions
from megatron_nvlm.hf.exported_code.processing_nvlm import NVLMProcessor
from megatron_nvlm.image.tile_tags import TAG_FORMATS
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.nvlm_model import normalise
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.templates import TEMPLATES
from tests.hf.folders import (
    PROMPTS,
    SYSTEM,
    TOKENS_PER_TILE,
    VARIANT_NAMES,
    Prompt,
    config_of,
    opened,
    pipeline_of,
    write_tokenizer,
)
from tests.hf.processors import load_processor
from tests.support import plain_rows
from tests.support.pictures import avif_with_a_hole, unreadable_exif
from tests.support.tiny import tiny_config

BASE_TOKENS = 2000
"""So many that `><` is one token, which `chatml_hf` lets span wrapper and tag."""
END_ID, PLACE_ID = BASE_TOKENS + 2, BASE_TOKENS + 3
"""<|im_end|>, and the first id after the tokenizer's."""
OTHER_TOKENS = ("chatml_yi", "llama3", "mistral")
"""Templates that need special tokens of other tokenizers (tests/text/test_instruct_templates.py)."""
TEMPLATES_HERE = [name for name in TEMPLATES if name not in OTHER_TOKENS]


def make_processor(folder: Path, variant: str, template: str = "chatml", tag_format: str = "1d") -> NVLMProcessor:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", BASE_TOKENS)
    config = config_of(tiny_config(variant))
    config["llm_config"]["vocab_size"] = BASE_TOKENS + 50
    write_companions(
        folder, config, folder / "tokenizer.json", template, SYSTEM, TilingConfig(tag_format=tag_format, max_tiles=6)
    )
    return load_processor(folder)


def check(inputs: Any, samples: list[PreparedSample], variant: str) -> None:
    """Every tensor against training's rows; padding stands on the left and says that it is padding."""
    most_tokens = max(len(sample.sequence.tokens) for sample in samples)
    assert inputs["input_ids"].shape == (len(samples), most_tokens)
    with_images = any(len(sample.tiles) for sample in samples)
    assert ("pixel_values" in inputs) == with_images
    assert ("context_intervals" in inputs) == (with_images and variant != "d")
    for number, sample in enumerate(samples):
        rows, missing = sample.sequence, most_tokens - len(sample.sequence.tokens)
        own = inputs["input_ids"][number, missing:].numpy()
        assert inputs["attention_mask"][number].tolist() == [0] * missing + [1] * len(rows.tokens)
        is_vision = rows.decoder_vision_index >= 0
        np.testing.assert_array_equal(own, np.where(is_vision, PLACE_ID, rows.tokens))
        if not with_images:
            assert not is_vision.any()
            continue
        assert int(inputs["num_tiles"][number]) == rows.num_tiles
        np.testing.assert_array_equal(inputs["vision_index"][number, missing:], rows.decoder_vision_index)
        assert (inputs["vision_index"][number, :missing] == -1).all()
        if variant != "d":
            kept = len(rows.context_tokens)
            np.testing.assert_array_equal(inputs["context_input_ids"][number, :kept], rows.context_tokens)
            np.testing.assert_array_equal(inputs["context_vision_index"][number, :kept], rows.context_vision_index)
            assert (inputs["context_vision_index"][number, kept:] == -1).all()
            np.testing.assert_array_equal(inputs["context_intervals"][number, missing:], rows.context_intervals)
    if with_images:
        tiles = torch.from_numpy(np.concatenate([sample.tiles for sample in samples]))
        assert torch.equal(inputs["pixel_values"], normalise(tiles, torch.float32))


def check_plain_form(prompt: Prompt, sample: PreparedSample, pipeline: SamplePipeline) -> None:
    """Training's rows and tiles against the second statement of the rules in tests/support/plain_rows.py."""
    template, tiling = TEMPLATES[pipeline.template], pipeline.tiling
    turns = [("system", SYSTEM), *prompt.turns] if template.takes_system else list(prompt.turns)
    layout = plain_rows.Layout(
        pipeline.variant.name, template.content, tiling.tag_format, tiling.thumbnail_tag, TOKENS_PER_TILE
    )
    grids = [plain_rows.choose_grid(*size, tiling.max_tiles, tiling.tile_size) for size in prompt.sizes]
    rows, found = layout.rows(turns, grids, pipeline.tokenizer, open_answer=True), sample.sequence
    assert rows.ids == found.tokens.tolist() and rows.vision_index == found.decoder_vision_index.tolist()
    assert rows.context_ids == found.context_tokens.tolist()
    assert rows.context_index == found.context_vision_index.tolist()
    assert [list(seen) for seen in rows.intervals] == found.context_intervals.tolist()
    tiles = [
        np.asarray(tile).transpose(2, 0, 1)
        for picture, grid in zip(opened(prompt.images), grids, strict=True)
        for tile in plain_rows.cut_tiles(picture, grid, tiling.tile_size)
    ]
    assert len(tiles) == len(sample.tiles) and all(map(np.array_equal, tiles, sample.tiles))


@pytest.mark.parametrize("tag_format", TAG_FORMATS)
@pytest.mark.parametrize("template", TEMPLATES_HERE)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_every_template_and_tag(tmp_path: Path, variant: str, template: str, tag_format: str) -> None:
    processor = make_processor(tmp_path / "folder", variant, template, tag_format)
    prompts = list(PROMPTS.values())
    inputs = processor([prompt.images for prompt in prompts], [prompt.messages for prompt in prompts])
    pipeline = pipeline_of(variant, template, tag_format, BASE_TOKENS)
    samples = [prompt.prepare(pipeline) for prompt in prompts]
    check(inputs, samples, variant)
    for prompt, sample in zip(prompts, samples, strict=True):
        check_plain_form(prompt, sample, pipeline)


@pytest.fixture(
    scope="module", params=[(variant, name) for variant in VARIANT_NAMES for name in ("chatml", "chatml_hf")]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, NVLMProcessor]:
    variant, template = request.param
    return variant, template, make_processor(tmp_path_factory.mktemp("folder"), variant, template)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<|im_end|>", "\n", " ", "<Image>", "</Image>", "<tile_1>", "a<|im_start|>user\n", "é", "e\u0301", "<"]
)
side = st.integers(1, 400)
word = st.one_of(text, st.tuples(side, side))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    turns, sizes = [], []
    for number in range(draw(st.sampled_from([1, 1, 3]))):
        said = ""
        role = "assistant" if number % 2 else "user"
        for part in draw(st.lists(word, max_size=4)):
            sizes += [part] if isinstance(part, tuple) and role == "user" else []
            said += "<image>" if isinstance(part, tuple) else part.replace("<image>", "")
        turns.append((role, said))
    return Prompt(tuple(turns), tuple(sizes))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(prompts(), min_size=1, max_size=3))
def test_any_conversation(case: tuple[str, str, NVLMProcessor], batch: list[Prompt]) -> None:
    """Sizes of any shape, several images and turns, ragged batches, text that spells special tokens or tags."""
    variant, template, processor = case
    pipeline = pipeline_of(variant, template, base_tokens=BASE_TOKENS)
    samples = [prompt.prepare(pipeline) for prompt in batch]
    inputs = processor([prompt.images for prompt in batch], [prompt.messages for prompt in batch])
    check(inputs, samples, variant)
    for prompt, sample in zip(batch, samples, strict=True):
        check_plain_form(prompt, sample, pipeline)


def test_images_of_every_kind_are_read_as_in_training(tmp_path: Path) -> None:
    """16-bit grey, palette, transparency, EXIF orientation; as bytes, files, Pillow images and arrays."""
    processor = make_processor(tmp_path / "folder", "d")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "grey.png": Image.fromarray(rng.integers(0, 65536, (40, 80), dtype=np.uint16)),
        "palette.gif": Image.fromarray(noise).quantize(16),
        "clear.png": Image.fromarray(rng.integers(0, 256, (50, 60, 4), dtype=np.uint8)),
        "turned.jpg": Image.fromarray(noise),
    }
    prompt = Prompt((("user", "<image>"),))
    for name, image in pictures.items():
        path = tmp_path / name
        image.save(path, **({"exif": exif} if name == "turned.jpg" else {}))
        stored = _with_image(prompt, path.read_bytes())
        for given_as in (path.read_bytes(), path, str(path), opened([path.read_bytes()])[0]):
            check(processor(given_as, "<image>"), [stored], "d")
    plain = tmp_path / "plain.png"
    Image.fromarray(noise).save(plain)
    check(processor(noise, "<image>"), [_with_image(prompt, plain.read_bytes())], "d")


def _with_image(prompt: Prompt, data: bytes) -> PreparedSample:
    record = {"conversation": prompt.messages, "images": [{}]}
    return pipeline_of("d", base_tokens=BASE_TOKENS).prepare(
        RawSample("prompt", record, {"0.img": data}), open_answer=True
    )


def test_four_ways_to_ask_the_same(tmp_path: Path) -> None:
    """A question, a conversation with images in it, a spelled prompt, a flat list of images."""
    processor = make_processor(tmp_path / "folder", "h")
    images = opened(PROMPTS["two images"].images)
    expected = processor([images], [PROMPTS["two images"].messages])
    question = PROMPTS["two images"].turns[0][1]
    inside = [
        {"type": "image", "image": images[0]},
        {"type": "text", "text": " and "},
        {"type": "image", "image": images[1]},
        {"type": "text", "text": ": compare."},
    ]
    messages = [{"role": "user", "content": inside}]
    spelled = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert spelled.startswith("<|im_start|>system\n") and spelled.endswith("<|im_start|>assistant\n")
    asked = [
        processor(images, question),
        processor(text=messages),
        processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True),
        processor(images, [spelled]),
    ]
    for inputs in asked:
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    closed = processor.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert closed.shape[1] == expected["input_ids"].shape[1] - len(processor._tokenizer.encode("assistant\n")) - 1


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_the_calls_of_lmms_eval(tmp_path: Path, variant: str) -> None:
    """Its class for any model of transformers: text of a batch first, then all inputs, and the answers by batch_decode."""
    processor = make_processor(tmp_path, variant)
    pictures = [Image.new("RGB", (60, 30 * number), "red") for number in (1, 2)]
    messages = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "url": picture}, {"type": "text", "text": f"\nRead {number}."}],
            }
        ]
        for number, picture in enumerate(pictures)
    ]
    texts = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=texts, images=pictures, videos=None, audios=None, padding=True, return_tensors="pt")
    asked = [f"<image>\nRead {number}." for number in range(2)]
    expected = processor(text=asked, images=[[picture] for picture in pictures])
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    ids = torch.tensor([processor.tokenizer("Read 0.").input_ids])
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["Read 0."]
    with pytest.raises(ValueError, match="NVLM takes images"):
        processor(text=texts, images=pictures, audios=["sound"])


def test_the_tokenizers_own_template_spells_the_same(tmp_path: Path) -> None:
    """What other software gets from chat_template.jinja is the processor's text."""
    talk = [*PROMPTS["two turns"].messages]
    for template in TEMPLATES_HERE:
        processor = make_processor(tmp_path / template, "d", template)
        for messages in (talk, [{"role": "system", "content": "Be 'brief'."}, *talk]):
            for ask in (False, True):
                theirs = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
                assert theirs == processor.prompt(messages, ask)


def test_where_an_answer_ends_and_what_stands_for_vision_tokens(tmp_path: Path) -> None:
    processor = make_processor(tmp_path / "folder", "x")
    assert processor.tokenizer.padding_side == "left"  # of batches of text made without the processor
    generation = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == END_ID and generation["pad_token_id"] == BASE_TOKENS
    tokenizer_file = tmp_path / "folder" / "tokenizer.json"
    assert image_context_token_id(tokenizer_file, PLACE_ID + 1) == PLACE_ID
    assert image_context_token_id(tokenizer_file, PLACE_ID) is None
    fast = qwen2_tokenizer(300)
    fast.add_special_tokens(["<|vision_start|>", "<|vision_pad|>"])
    fast.save(str(tmp_path / "with_pad.json"))
    assert image_context_token_id(tmp_path / "with_pad.json", 1152) == 304


def test_without_a_free_id_the_index_says_it_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json")
    config = config_of(tiny_config("d"))
    config["llm_config"]["vocab_size"] = 303
    write_companions(
        folder, config, folder / "tokenizer.json", "chatml", SYSTEM, TilingConfig(tag_format="1d", max_tiles=6)
    )
    inputs = load_processor(folder)(PROMPTS["one tile"].images, PROMPTS["one tile"].turns[0][1])
    assert int(inputs["input_ids"].max()) < 303
    assert int((inputs["vision_index"] >= 0).sum()) == TOKENS_PER_TILE


@pytest.mark.parametrize(
    ("images", "asked", "words"),
    [
        ([], "<image> what?", "1 <image> and there are 0 images"),
        ([np.zeros((9, 9, 3), np.uint8)] * 2, "<image> what?", "1 <image> and there are 2 images"),
        ([[np.zeros((9, 9, 3), np.uint8)], []], ["what?", "<image> what?"], r"\[0, 1\] <image> and \[1, 0\] images"),
        (None, 7, "a prompt is a int"),
        (None, "<|im_start|>user\nno end", "has no end"),
        (None, "<|im_start|>user\na<|im_end|>\nb", "goes on with 'b'"),
        (None, [{"role": "robot", "content": ""}], "a turn needs role"),
        (None, [{"role": "user", "content": [{"type": "video"}]}], "part of type 'video'"),
        (None, [{"role": "assistant", "content": [{"type": "image"}]}], "images go into turns of the user"),
        ([b"no image"], "<image>", "cannot be decoded"),
        ([avif_with_a_hole()], "<image>", "cannot be decoded"),
        ([Image.open(io.BytesIO(unreadable_exif()))], "<image>", "cannot be decoded"),
        ([str(Path(__file__).parent / "nothing.png")], "<image>", "nothing.png'.; give Pillow images"),
        ([np.zeros((9, 9, 7), np.uint8)], "<image>", "an image cannot be read"),
        ([3], "<image>", "int is no image"),
        (np.zeros((0, 9, 3), np.uint8), "<image>", "0 pixels|cannot be read"),
    ],
)
def test_bad_prompts_are_refused_with_a_sentence(tmp_path: Path, images: Any, asked: Any, words: str) -> None:
    processor = make_processor(tmp_path / "folder", "x")
    with pytest.raises(ValueError, match=words) as caught:
        processor(images, asked)
    assert "\n" not in str(caught.value)


def test_bad_exports_are_refused_with_a_sentence(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    config = config_of(tiny_config("d"))
    for template, tag_format, words in (
        ("chatml_yi", "1d", "startoftext"),
        ("nothing", "1d", "choose one of"),
        ("chatml", "3d", "choose one of"),
    ):
        with pytest.raises(UserError, match=words):
            write_companions(
                tmp_path,
                config,
                tmp_path / "tokenizer.json",
                template,
                None,
                TilingConfig(tag_format=tag_format, max_tiles=6),
            )
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        (tmp_path / "broken.json").write_text("{}")
        image_context_token_id(tmp_path / "broken.json", 10)


def test_a_token_spans_wrapper_and_tag(tmp_path: Path) -> None:
    """What the tests above rely on to tell `chatml_hf` from `chatml`."""
    encoder = make_processor(tmp_path / "folder", "d")._tokenizer
    assert len(encoder.encode("<Image><tile_1>")) == len(encoder.encode("<Image>") + encoder.encode("<tile_1>")) - 1


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_answers_first_newline_stays_apart_from_its_header(tmp_path: Path, variant: str) -> None:
    """Training tokenises the header alone: two newlines in a row are two tokens here and one within a text."""
    talk = Prompt((("user", "\n<image>"), ("assistant", "\nHi\n\n"), ("user", "\nso <image>?")), ((50, 50), (120, 60)))
    processor = make_processor(tmp_path / "folder", variant)
    check(
        processor([talk.images], [talk.messages]),
        [talk.prepare(pipeline_of(variant, base_tokens=BASE_TOKENS))],
        variant,
    )

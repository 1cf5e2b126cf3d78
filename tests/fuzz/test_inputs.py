"""Whatever chance makes of small valid files, each ends as what it says or as one sentence: nothing else, and in time.

A sample's text stands in its input, its pictures are the input's own, and a line that names one is not text alone. 2,000
files in `make test`, 50,000 in `make test-all`; a failure names the kind of file and the seed.
"""

import json
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.data.building.forms import DEFAULT_CAPTION_PROMPT
from megatron_nvlm.data.building.inputs import open_json
from megatron_nvlm.data.building.samples import SampleSettings, make_sample
from megatron_nvlm.data.building.webdataset import WebDatasetShards
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.config_json import check_whole_folder, cross_attention_of, is_whole_folder
from megatron_nvlm.image.pixels import decode_image
from megatron_nvlm.models.families.config_file import read_config
from megatron_nvlm.models.families.language_json import language_preset_of
from megatron_nvlm.models.families.visions import vision_preset_of
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.data.building.builds import coloured, write_tar
from tests.hf.folders import config_of
from tests.support.mutations import dump, mutate_bytes, mutate_json, strings_of
from tests.support.pictures import KINDS, with_exif
from tests.support.shards import write_samples
from tests.support.tiny import tiny_config

SECONDS = 20
"""For one small file: far more than it takes, on a busy machine too."""
SETTINGS = SampleSettings(images="whole", tile_size=56, max_tiles=6, quality=90, source="fuzz")
PICTURES = {f"{colour}.png": coloured(colour) for colour in ("red", "green", "blue")}
LINES: list[dict[str, Any]] = [
    {
        "id": 1,
        "image": "red.png",
        "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B."}],
    },
    {
        "image": ["red.png", "blue.png"],
        "question": "Which is red?",
        "answer": ["one", "one", "two"],
        "system": "Be kind.",
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "green.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Green.", "loss": True},
        ]
    },
    {"file_name": "blue.png", "text": "A blue one.", "images": None},
    {"conversations": [{"from": "human", "value": "This?", "image": "red.png"}, {"from": "gpt", "value": "Red."}]},
    {"text": "No picture at all."},
]
TAR = [
    ("a.png", PICTURES["red.png"]),
    ("a.json", json.dumps({"caption": "Red."})),
    ("b.json", json.dumps({"images": ["b.1.png", "b.0.png"], "question": "<image><image>?", "answer": "C."})),
    ("b.0.png", PICTURES["green.png"]),
    ("b.1.png", PICTURES["blue.png"]),
    ("c.txt", "A caption."),
    ("c.png", (tarfile.SYMTYPE, "a.png")),
]
Case = Callable[[Path, int], bool]
"""(empty folder, seed) -> whether the file ended as what it says; UserError otherwise."""


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"it took over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_made_of(said: str, texts: list[str]) -> bool:
    """Whether a text stands in one of these, or is several of them in a row (the parts of a message)."""
    if any(said in text for text in texts):
        return True
    begins = sorted((text.strip() for text in texts if text.strip() and said.startswith(text.strip())), key=len)
    return bool(begins) and is_made_of(said[len(begins[-1]) :].strip(), texts)


def check_sample(record: dict[str, Any], pictures: dict[str, bytes], texts: list[str], files: list[bytes]) -> None:
    """Every turn's text stands in the input, and every picture is one of its files."""
    for turn in record["conversation"]:
        for part in turn["value"].split("<image>"):
            said = part.strip()
            assert said == DEFAULT_CAPTION_PROMPT or is_made_of(said, texts), f"{said!r} is not the input's"
    assert all(data in files for data in pictures.values())


SAID = frozenset(
    ("id", "source", "system", "text", "value", "content", "question", "answer", "caption", "from", "role")
)
"""Fields of prose, which may say anything."""


def names_a_picture(content: Any, field: str = "") -> bool:
    """Whether a line names one of the pictures anywhere but in prose."""
    if isinstance(content, dict):
        return any(key in PICTURES or names_a_picture(value, key) for key, value in content.items())
    if isinstance(content, list):
        return any(names_a_picture(one, field) for one in content)
    return field not in SAID and content in PICTURES


def image(folder: Path, seed: int) -> bool:
    picture = decode_image(mutate_bytes(with_exif(KINDS[seed % len(KINDS)]), seed))
    assert picture.mode == "RGB"
    return True


def json_lines(folder: Path, seed: int) -> bool:
    """One line changed by structure or by bytes, among others."""
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    content = LINES[seed % len(LINES)]
    line = dump(mutate_json(content, seed)) if seed % 2 else mutate_bytes(dump(content), seed)
    path = folder / "data.jsonl"
    path.write_bytes(line + b"\n")
    opened, good = open_json(path, None), 0
    for number in range(len(opened)):
        sample = opened.read(number)
        record, pictures = make_sample(sample, SETTINGS)
        good += 1
        texts = strings_of(json.loads(opened._bytes_of(number)))
        check_sample(record, pictures, texts, list(PICTURES.values()))
        assert pictures or not names_a_picture(json.loads(opened._bytes_of(number))), "a picture became text"
        assert len(pictures) == sum(
            turn["value"].count("<image>") for turn in record["conversation"] if turn["from"] == "human"
        )
    if opened.faults:
        raise UserError(opened.faults[0])
    return good > 0


def tar(folder: Path, seed: int) -> bool:
    data = mutate_bytes(write_tar(folder / "000.tar", TAR).read_bytes(), seed)
    (folder / "000.tar").write_bytes(data)
    opened, refused = WebDatasetShards(folder), ""
    for number in range(len(opened)):
        try:
            sample = opened.read(number)
            record, pictures = make_sample(sample, SETTINGS)
        except UserError as error:
            refused = str(error)
            continue
        assert all(picture in data for picture in sample.images)
        held = [
            text
            for text in strings_of(dict(sample.content))
            if text.encode() in data or json.dumps(text)[1:-1].encode() in data
        ]
        check_sample(record, {}, held, [])
    if refused or opened.faults:
        raise UserError(refused or opened.faults[0])
    return True


def shards(folder: Path, seed: int) -> bool:
    """One file of a finished set: what is read is what was written."""
    out = folder / "set"
    written = [
        (
            {
                "conversation": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f"{n}."}],
                "images": [{}],
            },
            {"0.png": data},
        )
        for n, data in enumerate(PICTURES.values())
    ]
    write_samples(out, written)
    files = sorted(path for path in out.iterdir() if path.is_file())
    path = files[seed % len(files)]
    path.write_bytes(mutate_bytes(path.read_bytes(), seed))
    opened = ShardSet(out)
    for number, (record, pictures) in enumerate(written):
        found = opened.read(number)
        assert dict(found.pictures) == pictures and found.record["conversation"] == record["conversation"]
    return True


def tokenizer(folder: Path, seed: int) -> bool:
    stored = json.loads(qwen2_tokenizer(300).to_str())
    path = folder / "tokenizer.json"
    if seed % 2:
        for part in ("vocab", "merges"):  # else nearly every change would be one of these
            if chance := seed % 7:
                stored["model"][part] = stored["model"][part] if chance > 2 else type(stored["model"][part])()
        path.write_bytes(dump(mutate_json(stored, seed)))
    else:
        path.write_bytes(mutate_bytes(dump(stored), seed))
    loaded = Tokenizer.load(path)
    ids = loaded.encode("What is this? é 赤")
    assert all(isinstance(token, int) and token >= 0 for token in ids)
    return True


def config(folder: Path, seed: int) -> bool:
    content = config_of(tiny_config("dxh"[seed % 3]))
    data = dump(mutate_json(content, seed)) if seed % 4 else mutate_bytes(dump(content), seed)
    (folder / "config.json").write_bytes(data)
    found = read_config(folder)
    language = language_preset_of(folder)
    vision = vision_preset_of(folder)
    if is_whole_folder(found):
        check_whole_folder(found, folder)
        cross_attention_of(found, folder)
    sizes = [value for preset in (language, vision) for value in vars(preset).values() if type(value) in (int, float)]
    assert all(0 < value < 10**12 for value in sizes), sizes
    return True


CASES: dict[str, Case] = {case.__name__: case for case in (image, json_lines, tar, shards, tokenizer, config)}
IN_MAKE_TEST, NIGHTLY = 2_000, 50_000


def run(name: str, seeds: range, tmp_path: Path) -> Counter[str]:
    ends: Counter[str] = Counter()
    for seed in seeds:
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        try:
            with in_time():
                ends["as it says" if CASES[name](folder, seed) else "empty"] += 1
        except UserError as error:
            sentence = str(error)
            assert sentence.strip() and len(sentence) < 2_000 and "Traceback" not in sentence, (name, seed, sentence)
            ends["a sentence"] += 1
        except BaseException as error:
            raise AssertionError(f"{name} with seed {seed} ended with {type(error).__name__}: {error}") from error
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    return ends


@pytest.mark.parametrize("name", CASES)
def test_changed_files_end_as_they_say_or_as_a_sentence(name: str, tmp_path: Path) -> None:
    ends = run(name, range(IN_MAKE_TEST // len(CASES) + 1), tmp_path)
    assert ends["a sentence"] > 20 and ends["as it says"] > 0, ends


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_many_more_of_them(name: str, tmp_path: Path) -> None:
    run(name, range(IN_MAKE_TEST, IN_MAKE_TEST + NIGHTLY // len(CASES)), tmp_path)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["red.png", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "from", "value", "role", "content", "path"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
FIELDS = (
    "id",
    "image",
    "images",
    "file_name",
    "conversations",
    "messages",
    "question",
    "answer",
    "caption",
    "text",
    "system",
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), anything))
def test_lines_of_any_content(tmp_path_factory: pytest.TempPathFactory, line: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("lines")
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    (folder / "data.jsonl").write_bytes(dump(line) + b"\n")
    opened = open_json(folder / "data.jsonl", None)
    try:
        record, pictures = make_sample(opened.read(0), SETTINGS)
    except UserError as error:
        assert str(error).strip()
    else:
        check_sample(record, pictures, strings_of(line), list(PICTURES.values()))
        assert pictures or not names_a_picture(line), "a picture became text"

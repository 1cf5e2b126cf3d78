"""Shards from JSON lines, folders and WebDataset: the same bytes from any number of processes, after any interruption."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.image.tiling import TilingConfig, choose_grid, cut_tiles
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.commands.shard_builds import build, files_of, material, tokenizer
from tests.support.shards import picture

__all__ = ["material", "tokenizer"]

ROOT = Path(__file__).parents[2]


def test_every_form_is_read(material: Path, tokenizer: Path) -> None:
    shards = ShardSet(build(material, "set", "--tokenizer", str(tokenizer)))
    records = [shards.read(number).record for number in range(len(shards))]
    assert len(records) == 26
    turns = [[(turn["from"], turn["value"]) for turn in record["conversation"]] for record in records]
    assert turns[:8] == [
        [("human", "<image>\nWhat?"), ("gpt", "A.")],
        [("human", "<image>, <image>?"), ("gpt", "Two.")],
        [("human", "<image>\nDescribe the image briefly."), ("gpt", "A long picture")],
        [("human", "<image>\nHow many?"), ("gpt", "three")],
        [("human", "What is 2 + 2?"), ("gpt", "4")],
        [("gpt", "Only words.")],
        [("human", "<image>\nSee"), ("gpt", "Yes")],
        [("system", "Be brief."), ("human", "This<image>"), ("gpt", "Yes")],
    ]
    assert records[0]["id"] == "a/b.c" and shards.read(0).key == "set-000000000"
    assert [len(record["images"]) for record in records[:6]] == [1, 2, 1, 1, 0, 0]


def test_tiles_are_those_of_the_rule(material: Path) -> None:
    """Grid, names, order and pixels of tiles cut in advance, but for JPEG."""
    shards = ShardSet(build(material, "set", "--quality", "100"))
    sample = shards.read(0)
    image = Image.open(material / "images" / "0.png")
    grid = choose_grid(*image.size, 6, 56)
    assert sample.record["images"] == [{"width": 168, "height": 112, "grid": [3, 2]}]
    names = [*(f"0.tile_{number}.jpg" for number in range(1, 7)), "0.thumbnail.jpg"]
    assert list(sample.pictures) == names
    for name, tile in zip(names, cut_tiles(image, grid, 56), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(sample.pictures[name])), dtype=int)
        assert np.abs(stored - np.asarray(tile, dtype=int)).mean() < 2
    assert shards.index.settings["tile_size"] == 56


def test_whole_images_are_kept_byte_for_byte(material: Path) -> None:
    shards = ShardSet(build(material, "set", "--images", "whole"))
    assert shards.read(0).pictures == {"0.png": (material / "images" / "0.png").read_bytes()}
    assert list(shards.read(7).pictures) == ["0.jpg"]
    assert "tile_size" not in shards.index.settings  # so that a run may tile them as it likes


def test_text_alone_fits_any_size_of_tiles(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"question": "a?", "answer": "b"}\n' * 3)
    shards = ShardSet(build(tmp_path, "set", source=("--jsonl", str(tmp_path / "text.jsonl"))))
    assert len(shards) == 3 and "tile_size" not in shards.index.settings


def test_a_format_that_training_does_not_store_becomes_png(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(picture(30, 20, "BMP"))
    (tmp_path / "a.txt").write_text("A picture\n")
    shards = ShardSet(build(tmp_path, "set", "--images", "whole", source=("--folder", str(tmp_path))))
    sample = shards.read(0)
    assert list(sample.pictures) == ["0.png"]
    kept, original = (
        np.asarray(Image.open(source)) for source in (io.BytesIO(sample.pictures["0.png"]), tmp_path / "a.bmp")
    )
    assert (kept == original).all()


@pytest.mark.parametrize("images", ["tiles", "whole"])
def test_everything_written_can_be_trained_on(material: Path, tokenizer: Path, images: str) -> None:
    """For D, X and H; and the index's count of text is the pipeline's."""
    shards = ShardSet(build(material, "set", "--tokenizer", str(tokenizer), "--images", images))
    used = Tokenizer.load(tokenizer)
    counter = TextTokenCounter(used, "chatml", "Answer the questions.")
    for variant in VARIANTS.values():
        pipeline = SamplePipeline(used, TilingConfig(56, 6), variant, 4, 512, "chatml", "Answer the questions.")
        for number in range(len(shards)):
            raw = shards.read(number)
            prepared = pipeline.prepare(raw)
            assert prepared.sequence.loss_mask.sum() > 0
            assert int(shards.samples[number]["num_text_tokens"]) == counter(raw.record)


def test_the_same_bytes_from_any_number_of_processes(material: Path, tokenizer: Path) -> None:
    reference = files_of(build(material, "one/set", "--tokenizer", str(tokenizer)))
    assert len([name for name in reference if name.endswith(".tar")]) == 6
    for processes in ("2", "3"):
        folder = build(material, f"{processes}/set", "--tokenizer", str(tokenizer), "--processes", processes)
        assert files_of(folder) == reference


def test_shuffled_by_seed(material: Path) -> None:
    def answers(folder: Path) -> list[str]:
        shards = ShardSet(folder)
        return [shards.read(number).record["conversation"][-1]["value"] for number in range(len(shards))]

    plain = answers(build(material, "plain"))
    once, again, other = (
        answers(build(material, name, "--shuffle", seed)) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert once == again and once != other and once != plain
    assert sorted(once) == sorted(other) == sorted(plain)


def start(material: Path, out: Path, tokenizer: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "megatron_nvlm.commands.build_shards",
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer),
    ]
    command += ["--jsonl", str(material / "data.jsonl"), "--images-dir", str(material / "images")]
    command += ["--tile-size", "112", "--samples-per-shard", "5", "--quiet", "--processes", str(processes)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def test_killed_at_random_moments_and_repeated(material: Path, tokenizer: Path) -> None:
    """SIGKILL to the builder alone, as an out-of-memory killer sends it; another number of processes goes on."""
    line = json.dumps({"image": "11.png", "caption": "again"})
    with (material / "data.jsonl").open("a") as file:
        file.write(f"\n{line}" * 250)
    reference = start(material, material / "undisturbed" / "set", tokenizer, 2)
    assert reference.wait(120) == 0
    out, moments, killed = material / "killed" / "set", random.Random(5), 0
    for attempt in range(40):
        process = start(material, out, tokenizer, 1 + attempt % 3)
        began = len(list(out.glob("parts/*.json")))
        wish = began + 1 + moments.randrange(4)
        while process.poll() is None and len(list(out.glob("parts/*.json"))) < wish:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read() if process.stderr else ""
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (out / "manifest.json").exists():  # its work was done when the signal came, but for the report perhaps
            assert start(material, out, tokenizer, 1).wait(120) == 0
            break
        killed += 1
    assert killed >= 4
    assert files_of(out) == files_of(material / "undisturbed" / "set")


def test_a_finished_build_is_left_alone(material: Path) -> None:
    folder = build(material, "set")
    before = files_of(folder)
    assert files_of(build(material, "set")) == before


@pytest.mark.parametrize("change", [("--quality", "80"), ("--samples-per-shard", "7"), ("--max-tiles", "4")])
def test_another_build_is_refused(material: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str]) -> None:
    build(material, "set")
    with pytest.raises(SystemExit):
        build(material, "set", *change)
    assert (
        "holds a build with other settings; repeat its command, or give --rebuild or another --out"
        in capsys.readouterr().err
    )


def test_bad_inputs_are_each_named(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (material / "images" / "cut.jpg").write_bytes(picture(90, 90, "JPEG")[:600])
    (material / "images" / "none.jpg").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "x"}]
    bad: list[tuple[str, str]] = [
        ('{"image": "cut.jpg", "caption": "x"}', "its image 0: the image cannot be decoded"),
        ('{"image": "none.jpg", "caption": "x"}', "its bytes are of no known format"),
        ('{"image": "missing.jpg", "caption": "x"}', "missing.jpg cannot be read"),
        ('{"image": "images/../..", "caption": "x"}', "cannot be read"),
        ('{"image": 7, "caption": "x"}', "neither a path nor a list of paths"),
        ('{"image": "0.png", "caption": " "}', "its 'caption' or 'text' is empty"),
        ('{"image": "0.png"', "its JSON is broken"),
        ("[1, 2]", "its JSON is no object"),
        ('{"words": "x"}', "none of the fields that tell a form"),
        (json.dumps({"image": "0.png", "conversations": turns}), "its text has 2 <image> and it has 1 images"),
        (json.dumps({"conversations": turns[:1]}), "it has no answer"),
        ('{"question": "q", "answer": 4}', "its 'answer' is empty or no text"),
        ('{"conversations": [{"from": "cat", "value": "x"}]}', "and 'value', and its 'from' is 'cat'"),
        ('{"conversations": "hello"}', "no list of turns"),
        ("\x00\xff", "its JSON is broken"),
    ]
    with (material / "data.jsonl").open("ab") as file:
        for line, _ in bad:
            file.write(b"\n" + line.encode("latin-1"))
    folder = build(material, "set", "--max-reject-rate", "0.5")
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == len(bad)
    first_line = 52  # every other line of the file is empty
    for number, (reject, (_, reason)) in enumerate(zip(rejects, bad, strict=True)):
        assert reason in reject["reason"] and "\n" not in reject["reason"]
        assert reject["where"] == f"{material / 'data.jsonl'} line {first_line + number}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["num_rejects"] == len(bad) and manifest["counts"]["num_samples"] == 26
    assert len(ShardSet(folder)) == 26
    assert f"{len(bad)} inputs rejected, see rejects.jsonl" in capsys.readouterr().out


def test_too_many_rejects_fail_the_build(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (material / "images" / "7.png").write_bytes(b"none")
    with pytest.raises(SystemExit) as status:
        build(material, "set")
    assert status.value.code == 2
    assert "over the rate of 0.01 that --max-reject-rate sets" in capsys.readouterr().err
    assert "the image cannot be decoded" in (material / "set" / "rejects.jsonl").read_text()
    assert not (material / "set" / "index.json").exists()
    # With the picture fixed, or the rate raised, the same command goes on.
    assert len(ShardSet(build(material, "set", "--max-reject-rate", "0.2"))) == 23


def test_manifest_and_report(material: Path, tokenizer: Path) -> None:
    folder = build(material, "set", "--tokenizer", str(tokenizer), "--global-batch", "4", "--sequence-length", "256")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["num_samples"] == 26 and manifest["counts"]["num_images"] == 25
    for shard in manifest["shards"]:
        assert hashlib.sha256((folder / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert manifest["plan"]["settings"]["sample"]["quality"] == 90
    text, page = (folder / "report.txt").read_text(), (folder / "report.html").read_text()
    for part in ("26 of 26 inputs", "tiles per image", "text tokens per sample", "steps per epoch, packed", "NVLM-X"):
        assert part in text and part in page
    assert " 7 " in text.split("steps per epoch, unpacked")[1].splitlines()[0]  # 26 samples in batches of 4


def test_the_shard_size_is_about_what_was_asked(material: Path) -> None:
    line = json.dumps({"image": "0.png", "caption": "again"})
    with (material / "data.jsonl").open("a") as file:
        file.write(f"\n{line}" * 100)
    folder = material / "set"
    main(
        ["--out", str(folder), "--jsonl", str(material / "data.jsonl"), "--images-dir", str(material / "images")]
        + ["--tile-size", "56", "--shard-mb", "0.2", "--processes", "1", "--quiet"]
    )
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    assert len(sizes) > 3 and 120_000 < sum(sizes[:-1]) / (len(sizes) - 1) < 280_000


def test_help_is_clear() -> None:
    for tool in ("build_shards", "lint_shards", "inspect_sample"):
        shown = subprocess.run(
            [sys.executable, "-m", f"tools.{tool}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert shown.returncode == 0 and "usage: python -m" in shown.stdout


def test_nothing_to_build_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ([], "give --jsonl, --internvl-meta, --table, --folder or --webdataset"),
        (["--jsonl", str(tmp_path / "no")], "there is no file .*; correct --jsonl"),
        (["--folder", str(tmp_path / "no")], "there is no folder"),
        (["--webdataset", str(tmp_path / "no")], "there is no shard"),
        (["--folder", str(tmp_path)], "the input holds no sample"),
    ]
    for arguments, says in cases:
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "set"), *arguments])
        assert re.search(says, capsys.readouterr().err)
    shutil.rmtree(tmp_path / "set", ignore_errors=True)


def test_a_tokenizer_without_the_templates_tokens_is_refused_at_once(
    material: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by a reject of every sample."""
    content = json.loads(tokenizer.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<|im_")]
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        build(material, "without", "--tokenizer", str(tmp_path / "other.json"))
    assert "error: the tokenizer has no special token <|im_" in capsys.readouterr().err
    assert not (material / "without").exists()

"""Numbers that mean nothing are refused by the command line, in every command that takes them."""

import importlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm import option_types

WRONG = [
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--tile-size", "27", "27 is under 28"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--shard-mb", "nan", "nan is no finite number"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--global-batch", "0", "0 is under 1"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--max-reject-rate", "1.5", "from 0 to 1"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--processes", "-1", "-1 is under 1"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--tile-size", "1000000000000", "is over 4096"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--max-tiles", "1000000000000", "is over 1024"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--quality", "500", "500 is over 100"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--global-batch", "1000000000000", "is over 10000000"),
    (
        "commands.build_shards",
        ["--out", "x", "--jsonl", "y"],
        "--sequence-length",
        "1000000000000",
        "is over 100000000",
    ),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--shard-mb", "1e305", "is over 1000000"),
    ("commands.build_shards", ["--jsonl", "y"], "--out", "\udcc4\udce3", "is not UTF-8"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--source", "\udcc4\udce3", "is not UTF-8"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--system", "\udcc4\udce3", "is not UTF-8"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--caption-prompt", "\udcc4\udce3", "is not UTF-8"),
    ("commands.build_shards", ["--out", "x", "--jsonl", "y"], "--keep", "\udcc4\udce3", "is not UTF-8"),
    (
        "commands.build_shards",
        ["--out", "x"],
        "--webdataset",
        "s3://a/{0..3}.tar",
        "s3://a/{0..3}.tar is a URL, and only",
    ),
    ("commands.build_shards", ["--out", "x"], "--table", "https://a/b.parquet", "https://a/b.parquet is a URL"),
    ("commands.convert_checkpoint", ["import", "--variant", "d", "--out", "x"], "--hf", "https://a/b", "is a URL"),
    ("commands.chat_page", ["--run-dir", "x"], "--port", "70000", "70000 is over 65535"),
    ("commands.inspect_sample", ["--shards", "x"], "--tile-size", "14", "14 is under 28"),
    ("commands.dry_run", ["--config", "demo_h"], "--world-size", "1000000000000", "is over 10000000"),
    ("commands.lint_shards", ["x"], "--processes", "0", "0 is under 1"),
    ("commands.inspect_sample", ["--shards", "x"], "--max-tiles", "0", "0 is under 1"),
    ("commands.dry_run", ["--config", "demo_h"], "--world-size", "0", "0 is under 1"),
    ("commands.dry_run", ["--config", "demo_h", "--world-size", "1"], "--gpu-memory-gib", "inf", "no finite number"),
    ("commands.convert_checkpoint", ["export"], "--file-gigabytes", "0", "0 is not over 0"),
    ("commands.score", [], "--tensor-parallel", "two", "'two' is no whole number"),
    ("generate", ["--run-dir", "x", "--question", "?"], "--temperature", "-1", "-1 is under 0"),
    ("generate", ["--run-dir", "x", "--question", "?"], "--top-p", "2", "from 0 to 1"),
    ("evaluate", ["--run-dir", "x"], "--batch-size", "0", "0 is under 1"),
]


@pytest.mark.parametrize(("module", "others", "option", "value", "words"), WRONG)
def test_one_sentence_and_no_work(
    module: str, others: list[str], option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"megatron_nvlm.{module}").main
    try:
        status = main([*others, option, value])
    except SystemExit as ended:
        status = ended.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and option in last and words in last


@pytest.mark.parametrize("text", [".", "./", "..", "a/.."])
def test_a_folder_without_a_name_of_its_own(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of samples begin with the folder's name."""
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    assert option_types.named_folder(text).name == ("outer" if text == ".." else "inner")


@given(st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))
def test_what_is_taken_is_a_number_in_its_bounds(text: str) -> None:
    bounds = {"positive_int": (1, None), "natural_int": (0, None), "natural_float": (0, None), "share": (0, 1)}
    for name, (least, most) in bounds.items():
        try:
            value = getattr(option_types, name)(text)
        except option_types.argparse.ArgumentTypeError as error:
            assert "\n" not in str(error) or "\n" in text
        else:
            assert value >= least and (most is None or value <= most)

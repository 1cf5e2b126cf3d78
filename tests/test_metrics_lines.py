"""A file that grows is read line by line, once, and from its beginning after it was cut."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.metrics_lines import LineFollower, numbers_of


def lines_of(*steps: int, note: str = "") -> str:
    return "".join(json.dumps({"step": step, "note": note}) + "\n" for step in steps)


def test_only_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = LineFollower(path)
    assert follower.read().records == []
    path.write_text(lines_of(1, 2))
    assert [record["step"] for record in follower.read().records] == [1, 2]
    assert follower.read().records == []
    with path.open("a") as file:
        file.write(lines_of(3)[:-5])  # the writer is not done
        file.flush()
        assert follower.read().records == []
        file.write(lines_of(3)[-5:] + "no JSON\n" + "3\n" + lines_of(4))
    news = follower.read()
    assert [record["step"] for record in news.records] == [3, 4] and not news.begins_again


def test_a_file_that_a_resumed_run_has_cut_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(1, 2, 3, 4))
    follower = LineFollower(path)
    follower.read()
    path.write_text(lines_of(1, 2) + lines_of(3, 4, 5, 6, note="again"))  # longer than before
    news = follower.read()
    assert news.begins_again and [record["step"] for record in news.records] == [1, 2, 3, 4, 5, 6]
    path.unlink()
    assert follower.read().begins_again
    assert not follower.read().begins_again


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 9))
def test_any_cuts_of_the_writer_give_the_same_lines(cuts: list[int], count: int) -> None:
    import tempfile

    text = lines_of(*range(1, count + 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        follower, found = LineFollower(path), []
        for cut in [*sorted(cuts), len(text)]:
            path.write_text(text[:cut])  # the same file, grown
            found += [record["step"] for record in follower.read().records]
    assert found == list(range(1, count + 1))


def test_numbers_of_a_step() -> None:
    record = {"step": 3, "loss": float("nan"), "gates": {"layer_1": 0.5}, "done": True, "skipped": "why", "slow": [1]}
    numbers = numbers_of(record)
    assert list(numbers) == ["step", "loss", "gates/layer_1"] and numbers["gates/layer_1"] == 0.5

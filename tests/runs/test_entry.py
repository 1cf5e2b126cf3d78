"""What entry points make of mistakes: one sentence, for the user and for the launcher's report."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.backends import check_backend_is_installed
from megatron_nvlm.runs.entry import user_errors_end_the_process


def say_mistake(folder: Path) -> None:
    raise UserError("x.y is 3; set it to 4")


def write_where_a_file_is(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file" / "run").mkdir()


def make_what_is_there(folder: Path) -> None:
    folder.mkdir()


def read_what_is_not_there(folder: Path) -> None:
    (folder / "none").read_text()


def write_to_a_full_disk(folder: Path) -> None:
    Path("/dev/full").write_text("a line\n")


MISTAKES = {
    say_mistake: "x.y is 3; set it to 4",
    write_where_a_file_is: "{}/file/run: Not a directory; a part of the path is no folder; name another one",
    make_what_is_there: "{}: File exists; move it away, or name another one",
    read_what_is_not_there: "{}/none: No such file or directory; correct the path",
    write_to_a_full_disk: "No space left on device; make room and start again",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_one_sentence_for_user_and_launcher(
    mistake: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    sentence = MISTAKES[mistake].format(tmp_path)
    assert user_errors_end_the_process(lambda arguments: mistake(tmp_path))() == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert json.loads(report.read_text())["message"]["message"] == f"error: {sentence}"


def test_other_errors_stay_what_they_are() -> None:
    def main(arguments: list[str] | None) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        user_errors_end_the_process(main)()


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_a_backend_that_is_not_installed() -> None:
    check_backend_is_installed("local")
    with pytest.raises(UserError, match="Transformer Engine is not installed; install transformer-engine, or set"):
        check_backend_is_installed("te")

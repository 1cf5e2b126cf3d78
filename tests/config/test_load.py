"""Run files: found by name, and read on where they use the section names of earlier versions."""

import logging
from pathlib import Path

import pytest

from megatron_nvlm.config.load import find_run_file, load_run
from megatron_nvlm.errors import UserError

DEMO = Path(__file__).parents[2] / "configs" / "demo_h.yaml"


@pytest.mark.parametrize("name", ["demo_h", "demo_h.yaml", str(DEMO)])
def test_a_run_file_is_found_by_name_or_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run_file(name) == DEMO


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no run file demo_y; did you mean demo_"):
        find_run_file("demo_y")


def test_a_file_of_the_users_comes_before_one_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_h.yaml").write_text(DEMO.read_text())
    assert find_run_file("demo_h.yaml") == Path("demo_h.yaml")


def write_old(folder: Path) -> Path:
    """The demo's run file as version 0.1 had it."""
    path = folder / "run.yaml"
    path.write_text(DEMO.read_text().replace("\nrecipe:\n", "\nstage:\n"))
    assert "\nstage:\n" in path.read_text()
    return path


@pytest.mark.parametrize(
    "overrides",
    [[], ["stage.name=pretrain"], ["recipe.name=pretrain"], ["stage={name: pretrain, trainable: null}"]],
    ids=["file", "old key", "new key", "old section"],
)
def test_old_section_names_are_read_with_one_warning(
    overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = load_run(write_old(tmp_path), overrides)
    (record,) = caplog.records
    assert "stage is now recipe" in record.getMessage()
    today = load_run(DEMO, [override.replace("stage", "recipe", 1) for override in overrides])
    assert run == today


def test_both_names_of_a_section_are_refused(tmp_path: Path) -> None:
    path = write_old(tmp_path)
    path.write_text(path.read_text() + "recipe: {name: sft}\n")
    with pytest.raises(UserError, match="has both stage and recipe"):
        load_run(path)

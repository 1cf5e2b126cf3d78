"""Documents say what is there: the drawn picture, the commands, the files and the keys that they name."""

import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_nvlm.config.load import load_run

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MODULE = re.compile(r"python -m ((?:tools|megatron_nvlm|benchmarks)(?:\.\w+)+)([^`\n]*)")
PATHS = re.compile(
    r"`((?:data|models|hf|runs|training|config|image|text|sequence|ops|parallel|accounting|checkpoint|estimate|inference|evaluation|"
    r"commands|demo|megatron_nvlm|tests|tools|configs|launch|docs|benchmarks)/[\w./-]*\.(?:py|md|yaml|sh|svg))`"
)
RUN_FILES = re.compile(r"configs/[\w]+\.yaml")


def text_of(page: Path) -> str:
    return page.read_text().replace("\\\n", " ")


def test_the_picture_is_the_one_that_its_text_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))["draw"]()
    assert drawn == (ROOT / "docs" / "architecture.svg").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = {*PATHS.findall(page.read_text()), *RUN_FILES.findall(page.read_text())}
    for name in sorted(name for name in named if "NAME" not in name):
        assert (ROOT / name).exists() or (ROOT / "megatron_nvlm" / name).exists(), f"{page.name} names {name}"


@cache
def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> set[tuple[str, str]]:
    found = {command for page in PAGES for command in MODULE.findall(text_of(page))}
    return {(module, arguments) for module, arguments in found if module != "tools.NAME"}


def test_the_commands_of_the_pages_exist_with_their_options() -> None:
    known = commands()
    assert len({module for module, _ in known}) > 8
    for module, arguments in sorted(known):
        if module.startswith("benchmarks"):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
            continue
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", arguments):
            options = help_of(module)
            subcommand = arguments.split()[0]
            if re.fullmatch(r"[a-z]+", subcommand) and subcommand in options:
                options += help_of(module, subcommand)
            assert option in options or option == "--help", f"python -m {module} has no {option}"


def test_the_keys_that_pages_override_are_keys_of_a_run() -> None:
    sections = "model|data|optimizer|training|tiling|recipe|parallelism|checkpoint|logging|validation"
    pattern = re.compile(rf"(?<![\w.])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?==)")
    run = load_run("demo_h")
    for page in PAGES:
        for key in pattern.findall(text_of(page)):
            value: object = run
            for name in key.split("."):
                assert hasattr(value, name), f"{page.name} sets {key}, which no run has"
                value = getattr(value, name)

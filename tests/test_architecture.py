"""Imports run one way, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_nvlm"

# Each line may import from the lines above it (and from itself).
LAYERS = (
    {"errors", "quiet", "hf_code"},  # hf_code is copied into folders and imports nothing of ours
    {"core_compat"},
    {"image", "text", "ops"},
    {"sequence"},
    {"data", "models"},
    {"parallel", "checkpoint"},
    {"run_parts"},
    {"training"},
    {"config"},
    {"inference", "evaluation"},
    {"entry"},
    {"train", "generate", "evaluate"},
)
WITHOUT_CORE = ("image", "text", "sequence", "data", "ops", "evaluation", "hf_code")
WITHOUT_TORCH = ("image", "text")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE) != Path("__init__.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = part_of(path)
    modules = imported_modules(path)
    # A command below a package (config/show.py) is an entry point.
    level = LEVEL["train"] if "__main__" in path.read_text() else LEVEL[own]
    for module in modules:
        parts = module.split(".")
        if parts[0] == "megatron_nvlm" and len(parts) > 1:
            other = parts[1]
            assert other == own or LEVEL[other] < level, f"{own} imports {other}"
    if own in WITHOUT_CORE:
        assert not [module for module in modules if module.split(".")[0] == "megatron"]
    if own in WITHOUT_TORCH:
        assert not [module for module in modules if module.split(".")[0] == "torch"]


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in FILES} == set(LEVEL)


def test_only_one_file_patches_core() -> None:
    for path in FILES:
        if part_of(path) != "core_compat":
            assert "megatron.core.__version__" not in path.read_text()
            assert "torch.cuda." not in path.read_text() or part_of(path) == "parallel", path


def test_data_loading_starts_without_core() -> None:
    script = "import sys, megatron_nvlm.data.loader; assert not [m for m in sys.modules if m.startswith('megatron.')]"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)

"""Imports run one way, what must stay light stays light, and files, functions and signatures stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_nvlm"

# Each line may import from the lines above it (and a room from itself).
LAYERS = (
    {"core_compat", "exit_codes", "runs.run_dir", "whole_files"},
    {"errors", "quiet", "runs.failures"},
    {"dotted_keys", "metrics_lines", "option_types", "regular_files"},
    {"image", "text", "ops", "trackers"},
    {"sequence"},
    {"data", "models"},
    {"hf.exported_code"},  # folders carry it, with what it imports of the rooms above
    {"parallel", "accounting"},
    {"checkpoint", "estimate"},
    {"hf"},
    {"training"},
    {"config"},
    {"runs"},
    {"watching"},
    {"inference"},
    {"evaluation"},
    {"train", "generate", "evaluate"},
    {"doctor", "gpu_check"},
    {"commands"},
    {"demo"},
    {"tools"},
)
# Within data/: the order is pure, shards are files, loading is processes.
DATA_LAYERS = (
    {"shards"},
    {"order"},
    {"prepare", "config"},
    {"collate", "fingerprint"},
    {"building", "loading"},
)
WITHOUT_CORE = ("image", "text", "sequence", "data", "ops", "hf.exported_code")
WITHOUT_TORCH = ("image", "text")
COMMAND_LINES_ONLY = ("commands", "doctor", "gpu_check", "demo", "tools", "train", "generate", "evaluate", "runs")
"""Rooms that may import `estimate`: it is arithmetic before a run, and no run needs it."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
DATA_LEVEL = {name: level for level, names in enumerate(DATA_LAYERS) for name in names}
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
FILES = [path for path in FILES if path != PACKAGE / "__init__.py"]
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 8
# Hugging Face's signatures: a model's forward and a processor's constructor take what transformers passes by name.
FOREIGN_SIGNATURES = {"modeling_nvlm.py", "processing_nvlm.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module `megatron_nvlm.a.b` given as (a, b)."""
    first = parts[0].removesuffix(".py")
    both = ".".join([first, parts[1].removesuffix(".py")]) if len(parts) > 1 else first
    return both if both in LEVEL else first


def room(path: Path) -> str:
    return room_of(path.relative_to(PACKAGE).parts) if path.is_relative_to(PACKAGE) else "tools"


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def own_imports(path: Path) -> Iterator[tuple[str, ...]]:
    for module in imported_modules(path):
        parts = tuple(module.split("."))
        if parts[0] == "megatron_nvlm" and len(parts) > 1:
            yield parts[1:]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    for parts in own_imports(path):
        other = room_of(parts)
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"
        assert other != "estimate" or own in ("estimate", *COMMAND_LINES_ONLY), f"{own} imports estimate"
    modules = imported_modules(path)
    if own in WITHOUT_CORE:
        assert not [module for module in modules if module.split(".")[0] == "megatron"]
    if own in WITHOUT_TORCH:
        assert not [module for module in modules if module.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=name_of)
def test_imports_within_data_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE / "data").parts[0].removesuffix(".py")
    for parts in own_imports(path):
        if parts[0] == "data" and len(parts) > 1:
            assert parts[1] == own or DATA_LEVEL[parts[1]] < DATA_LEVEL[own], f"data.{own} imports data.{parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_functions_and_signatures_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    if path.name in FOREIGN_SIGNATURES or path.parent.name == "triton":  # a kernel takes each stride by itself
        return
    for function in functions(path):
        assert (function.end_lineno or 0) - function.lineno < MOST_FUNCTION_LINES, f"{function.name} is long"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        taken = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(taken) <= MOST_PARAMETERS, f"{function.name} takes {len(taken)}"


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} == set(LEVEL)


def test_only_one_file_patches_core() -> None:
    for path in FILES:
        if room(path) != "core_compat":
            assert "megatron.core.__version__" not in path.read_text()
            assert "torch.cuda." not in path.read_text() or room(path) == "parallel" or path.parent.name == "triton", (
                path
            )


def test_data_loading_starts_without_core() -> None:
    loaded = "[m for m in sys.modules if m.startswith('megatron.')]"
    script = f"import sys, megatron_nvlm.data.loading.loader; assert not {loaded}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_tools_are_thin() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 10, f"{path.name}: the work of a command lives in the package"


def test_training_starts_without_the_compiler_of_torch() -> None:
    """Where there is no GPU."""
    script = (
        "import sys, torch, megatron_nvlm.train; assert torch.cuda.is_available() or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=ROOT)

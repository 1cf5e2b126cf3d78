"""After `pip install .`, away from the checkout, console commands build shards, train, export, import and answer."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from tests.support.shards import picture

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("megatron_nvlm", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that has this package, installed, beside its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in SOURCES:  # setuptools writes beside what it builds
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (REPOSITORY / name).exists():
            shutil.copyfile(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    # Dependencies come from this environment, whose own .pth file, which names this checkout, is not read from there.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "venv" / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, source], check=True)
    shutil.rmtree(source)
    return folder / "venv" / "bin"


def run(commands: Path, folder: Path, name: str, *arguments: object) -> str:
    """A console command in `folder`, with nothing of the checkout on its path."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    own = {"PATH": f"{commands}:{inherited['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [commands / name, *map(str, arguments)],
        cwd=folder,
        env={**inherited, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_console_commands_work_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    found = run(installed, tmp_path, "python", "-c", "import megatron_nvlm as package; print(package.__file__)")
    assert Path(found.strip()).is_relative_to(installed.parent)
    missing = "import importlib.util as util; print(util.find_spec('tools'), util.find_spec('configs'))"
    assert run(installed, tmp_path, "python", "-c", missing).split() == ["None", "None"]

    qwen2_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(16):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(60, 60, seed=number))
        lines.append({"image": f"{number}.png", "question": "What is this?", "answer": f"Picture {number}."})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counted = ("--tokenizer", "tokenizer.json", "--system", "none")
    build = ("--out", "shards", "--jsonl", "lines.jsonl", "--images-dir", "images", "--tile-size", 56, "--quiet")
    run(installed, tmp_path, "nvlm-build-shards", *build, *counted)

    own_data = ("data.train=[{path: shards, weight: 1}]", "data.valid=null", "data.tokenizer=tokenizer.json")
    short = ("training.train_steps=2", "training.micro_batch_size=2", "training.global_batch_size=4")
    small = ("optimizer.warmup_steps=1", "parallelism.tensor_model_parallel_size=1", "data.num_workers=0")
    run(installed, tmp_path, "nvlm-train", "--config", "demo_h", "run_dir=run", *own_data, *short, *small)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 1

    run(installed, tmp_path, "nvlm-convert-checkpoint", "export", "--checkpoint", "run", "--out", "folder")
    imported = ("import", "--hf", "folder", "--variant", "h", "--out", "imported")
    run(installed, tmp_path, "nvlm-convert-checkpoint", *imported)
    asked = ("--image", "images/0.png", "--question", "What is this?", "--max-new-tokens", 4)
    answers = [run(installed, tmp_path, "nvlm-generate", "--run-dir", name, *asked) for name in ("run", "imported")]
    assert answers[0] == answers[1]
    benchmarks = ("--hf", "folder", "--suite", "paper", "--data", "images", "--out", "report")
    assert run(installed, tmp_path, "nvlm-run-benchmarks", *benchmarks).count(": not run: put ") == 13

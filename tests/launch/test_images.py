"""Dockerfile and Apptainer definition say the same as each other and as the pins; no engine is needed, none builds them."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_nvlm.commands.make_job import CHECKOUT_IN_IMAGE, USER_IN_IMAGE
from tests.support.launch import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
DEFINITION = (REPOSITORY / "launch" / "apptainer.def").read_text()
INSTALL = REPOSITORY / "launch" / "image_install.sh"


def stage(name: str) -> str:
    """The text of a stage of the Dockerfile, continued lines joined."""
    stages = re.split(r"^FROM ", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)[1:]
    (found,) = [text for text in stages if text.splitlines()[0].endswith(f" AS {name}")]
    return found


def section(name: str) -> str:
    """The text of a section of the definition."""
    return re.split(r"^%(\w+)\n", DEFINITION, flags=re.MULTILINE)[1:][1::2][section_names().index(name)]


def section_names() -> list[str]:
    return re.findall(r"^%(\w+)$", DEFINITION, re.MULTILINE)


def pin(package: str) -> str:
    return dict(line.split("==") for line in (REPOSITORY / "requirements-ci.txt").read_text().split())[package]


def test_both_start_from_one_tagged_image_of_nvidia() -> None:
    base = stage("gpu").split()[0]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert f"Bootstrap: docker\nFrom: {base}\n" in DEFINITION
    for text in (DOCKERFILE, DEFINITION):
        assert set(re.findall(r"nvcr\.io/\S+", text)) == {base}


def test_both_install_the_megatron_core_that_is_tested_and_setup_allows() -> None:
    assert re.search(r"^ARG MEGATRON_CORE=(.*)$", stage("gpu"), re.MULTILINE).group(1) == pin("megatron-core")  # type: ignore[union-attr]
    assert re.search(r"MEGATRON_CORE=(\S+) launch/image_install.sh", section("post")).group(1) == pin("megatron-core")  # type: ignore[union-attr]
    allowed = re.search(r'"megatron-core([^"]*)"', (REPOSITORY / "setup.py").read_text())
    assert allowed is not None and SpecifierSet(allowed.group(1)).contains(pin("megatron-core"))
    assert '"megatron-core==$MEGATRON_CORE"' in INSTALL.read_text()


def test_the_cpu_stage_has_a_python_that_setup_allows_and_runs_the_tests() -> None:
    (version,) = re.findall(r"^python:(3\.\d+\.\d+)-bookworm ", stage("test"))
    (allowed,) = re.findall(r'python_requires="([^"]*)"', (REPOSITORY / "setup.py").read_text())
    assert SpecifierSet(allowed).contains(version)
    assert re.search(r"^RUN make test$", stage("test"), re.MULTILINE)


@pytest.mark.parametrize("name", ["test", "gpu"])
def test_stages_run_as_the_user_that_pods_ask_for(name: str) -> None:
    assert f"useradd --uid {USER_IN_IMAGE} " in stage(name)
    assert re.findall(r"^USER (\S+)$", stage(name), re.MULTILINE) == [f"{USER_IN_IMAGE}:{USER_IN_IMAGE}"]
    assert f"WORKDIR {CHECKOUT_IN_IMAGE}\n" in stage(name)


def test_the_health_check_is_the_doctor() -> None:
    command = json.loads(re.search(r"HEALTHCHECK .*?CMD (\[.*\])", stage("gpu")).group(1))  # type: ignore[union-attr]
    assert command == ["python", "-m", "megatron_nvlm.commands.doctor", "--quick"]
    assert " ".join(command) in section("help")
    if importlib.util.find_spec("megatron_nvlm.commands.doctor") is None:
        pytest.skip("this checkout has no doctor yet")
    done = subprocess.run([sys.executable, *command[1:3], "--help"], capture_output=True, text=True, cwd=REPOSITORY)
    assert "--quick" in done.stdout


def test_both_set_the_variables_of_cluster_env() -> None:
    settings = dict(re.findall(r"(OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS)=(\S+)", stage("gpu")))
    assert settings == dict(re.findall(r"(OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS)=(\S+)", section("environment")))
    cluster = (REPOSITORY / "launch" / "cluster.env").read_text()
    for name, value in settings.items():
        assert f'{name}="${{{name}:-{value}}}"' in cluster


def test_the_definition_copies_what_an_installation_needs_to_where_pods_expect_it() -> None:
    copied = dict(line.split() for line in section("files").splitlines() if line.strip())
    assert {"megatron_nvlm", "configs", "launch", "tools", "setup.py", "README.md", "pyproject.toml"} <= set(copied)
    for source, target in copied.items():
        assert (REPOSITORY / source).exists() and target == f"{CHECKOUT_IN_IMAGE}/{source}"
    assert section_names() == ["files", "post", "environment", "runscript", "help"]


@pytest.mark.parametrize("name", ["post", "environment", "runscript"])
def test_the_definition_is_valid_shell(name: str, tmp_path: Path) -> None:
    (tmp_path / "section.sh").write_text(f"#!/bin/sh\n{section(name)}")
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None
    excluded = "--exclude=SC2164"  # Apptainer runs sections with -e
    done = subprocess.run([shellcheck, excluded, tmp_path / "section.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def ignored(path: str) -> bool:
    """Docker's rule for patterns without `!`: from the root, `**/` for any depth, and what lies below."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for pattern in (line for line in lines if line and not line.startswith("#")):
        expression = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{expression}(?:/.*)?", path):
            return True
    return False


def test_the_context_of_a_build_holds_the_repository_and_nothing_that_runs_made() -> None:
    for path in (".git/HEAD", ".venv/bin/python", ".venv-newest/x", "runs/a/checkpoints/1", "data/pretrain/0.tar"):
        assert ignored(path), path
    assert ignored("megatron_nvlm/__pycache__/train.cpython-311.pyc") and ignored("megatron_nvlm.egg-info/PKG-INFO")
    for path in (
        "megatron_nvlm/data/config.py",
        "megatron_nvlm/runs/run_dir.py",
        "tests/data/test_epochs.py",
        ".ci/run",
    ):
        assert not ignored(path), path


PIP = """
if [ "$1" = list ]; then printf 'torch==2.10.0a0+b4e4ee81d3\\ntransformer_engine==IMAGE\\napex==0.1\\nnumpy==2.1.0\\n'; fi
if [ "$1" = install ]; then cat "$4" >"$INSTALLED"; echo "$@" >>"$INSTALLED"; fi
"""
PYTHON = """
import importlib.metadata, importlib.util, sys
versions = {"torch": "TORCH", "transformer_engine": "IMAGE", "transformer-engine": "IMAGE", "apex": "0.1"}
importlib.metadata.version = versions.__getitem__
importlib.metadata.requires = lambda name: ["torch>=2.6.0", 'transformer-engine[pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
importlib.util.find_spec = lambda name: APEX
sys.argv = sys.argv[1:]
exec(compile(sys.stdin.read(), "check", "exec"))
"""


@pytest.mark.parametrize(
    ("torch", "engine", "apex", "said"),
    [
        ("2.10.0a0+b4e4ee81d3", "2.10.0+abc", "True", ""),
        ("2.13.0", "2.10.0", "True", "torch of the image was replaced: 2.10.0a0+b4e4ee81d3 before, 2.13.0 now"),
        ("2.10.0a0+b4e4ee81d3", "2.4.0", "True", "and the image has 2.4.0"),
        ("2.10.0a0+b4e4ee81d3", "2.10.0", "None", "has no apex"),
    ],
)
def test_an_installation_keeps_the_packages_of_the_image(
    torch: str, engine: str, apex: str, said: str, tmp_path: Path
) -> None:
    """pip and the image's packages are stand-ins; the script and its check are real."""
    (tmp_path / "pip").write_text(f"#!/bin/bash{PIP.replace('IMAGE', engine)}")
    check = PYTHON.replace("TORCH", torch).replace("IMAGE", engine).replace("APEX", apex)
    (tmp_path / "check.py").write_text(check)
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "{tmp_path}/check.py" "$@"\n')
    for name in ("pip", "python"):
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MEGATRON_CORE": "0.16.1", "INSTALLED": str(tmp_path / "installed")}
    done = subprocess.run(["bash", str(INSTALL)], env=own, capture_output=True, text=True)
    assert (done.returncode == 0) == (not said) and said in done.stderr, done.stderr
    installed = (tmp_path / "installed").read_text()
    assert "torch==2.10.0a0+b4e4ee81d3" in installed and "numpy" not in installed
    assert "megatron-core==0.16.1 --editable .[demo]" in installed


def test_this_megatron_core_asks_for_the_transformer_engine_that_the_check_reads() -> None:
    from importlib.metadata import requires

    asked = [Requirement(text) for text in requires("megatron-core") or () if text.startswith("transformer-engine")]
    assert asked and asked[0].specifier

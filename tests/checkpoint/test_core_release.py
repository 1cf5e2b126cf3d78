"""A checkpoint says which Megatron-core wrote it; one in the form of a newer core is refused in a sentence."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest

from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE, MANIFEST_FILE
from megatron_nvlm.checkpoint.save_load import (
    COMMON_FILE,
    Identity,
    Progress,
    check_core,
    load_model,
    read_identity,
    write_identity,
)
from megatron_nvlm.commands import convert_checkpoint
from megatron_nvlm.core_compat import core_version, is_newer_than_core
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.parallel.device import Device
from tests.support.launch import launch
from tests.support.shards import write_run

IDENTITY = Identity("h", "tiny", "tiny", "0")


def say_who_wrote(checkpoint: Path, release: str | None) -> None:
    """As if that release had written it, in the form without common.pt; None: as before checkpoints said so."""
    says = json.loads((checkpoint / IDENTITY_FILE).read_text())
    says["core"] = release
    if release is None:
        del says["core"]
    (checkpoint / IDENTITY_FILE).write_text(json.dumps(says))
    (checkpoint / COMMON_FILE).unlink(missing_ok=True)
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("writer", "running", "refused"),
    [
        ("0.19.2", "0.16.1", True),
        ("0.19.2+f5e1696", "0.18.2", True),
        ("1.0.0", "0.19.2", True),
        ("0.19.2", "0.19.0", False),
        ("0.19.2", "0.20.0", False),
        ("0.9.0", "0.16.1", False),
        (None, "0.16.1", False),
    ],
)
def test_a_newer_release_is_refused_unless_its_checkpoint_is_in_the_old_form(
    writer: str | None, running: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_identity(tmp_path, IDENTITY, Progress(2, DataPosition(8)))
    assert json.loads((tmp_path / IDENTITY_FILE).read_text())["core"] == core_version()
    say_who_wrote(tmp_path, writer)
    monkeypatch.setattr(megatron.core, "__version__", running)
    assert read_identity(tmp_path) == IDENTITY
    if refused:
        says = f"was written by Megatron-core {writer} in a form that {running} cannot read; install"
        with pytest.raises(UserError, match=re.escape(says)):
            check_core(tmp_path)
    else:
        check_core(tmp_path)
    (tmp_path / COMMON_FILE).touch()
    check_core(tmp_path)


def test_it_is_refused_before_core_reads_it(tmp_path: Path, world_of_one: Device) -> None:
    write_identity(tmp_path, IDENTITY, Progress(2, DataPosition(8)))
    say_who_wrote(tmp_path, "99.1.0")
    model: Any = SimpleNamespace(sharded_state_dict=lambda metadata: {})
    with pytest.raises(UserError, match="by Megatron-core 99.1.0 in a form"):
        load_model(tmp_path, model)


def export(run_dir: Path, out: Path) -> list[bytes]:
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint.main(["export", "--checkpoint", str(run_dir), "--out", str(out)])
    assert not ended.value.code
    return [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]


@pytest.mark.distributed
def test_training_is_told_what_to_install_and_the_weights_can_be_exported(
    tmp_path: Path, world_of_one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any core reads the tensors of any checkpoint; `convert_checkpoint` wants nothing else."""
    run_dir = tmp_path / "run"
    arguments = ["--config", str(write_run(tmp_path, optimizer={"decay_steps": 8})), f"run_dir={run_dir}"]
    monkeypatch.setattr(convert_checkpoint, "stop_groups", lambda: None)  # they belong to the session here
    launch("megatron_nvlm.train", 1, *arguments, "training.train_steps=2")
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    assert json.loads((checkpoint / IDENTITY_FILE).read_text())["core"] == core_version()
    weights = export(run_dir, tmp_path / "before")
    say_who_wrote(checkpoint, "99.1.0")
    done = launch("megatron_nvlm.train", 1, *arguments, "training.train_steps=4", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("error: ")[0]
    assert f"error: the checkpoint {checkpoint} was written by Megatron-core 99.1.0 in a form that" in done.stderr
    assert "install megatron-core>=99.1 " in done.stderr
    assert weights and export(run_dir, tmp_path / "after") == weights


@pytest.mark.parametrize(
    ("release", "newer"),
    [("0.16.1", False), ("0.15.0", False), ("99.0rc1", True), ("99.1.2+a5c2210", True), ("", False)],
)
def test_releases_are_compared_however_they_are_written(release: str, newer: bool) -> None:
    assert is_newer_than_core(release) == newer
    assert "+" not in core_version()

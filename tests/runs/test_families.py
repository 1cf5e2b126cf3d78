"""The other families by the real commands: trained, exported and imported again, bit for bit."""

from pathlib import Path

import pytest

from tests.support.launch import launch, run_command
from tests.support.shards import read_metrics, write_run

pytestmark = pytest.mark.distributed


def convert(*arguments: object) -> str:
    return run_command("megatron_nvlm.commands.convert_checkpoint", *arguments)


@pytest.mark.parametrize(
    "variant", ["h", pytest.param("d", marks=pytest.mark.slow), pytest.param("x", marks=pytest.mark.slow)]
)
def test_qwen3_with_siglip(variant: str, tmp_path: Path) -> None:
    run_file = write_run(
        tmp_path / "run",
        model={"variant": variant, "language": "tiny_qwen3", "vision": "tiny_siglip"},
        tiling={"tile_size": 70},
        training={"train_steps": 8},
    )
    launch("megatron_nvlm.train", 1, "--config", str(run_file), f"run_dir={tmp_path / 'trained'}")
    losses = [row["loss"] for row in read_metrics(tmp_path / "trained")]
    assert losses[-1] < losses[0]
    convert("export", "--checkpoint", tmp_path / "trained", "--out", tmp_path / "exported")
    assert "bit for bit" in convert("verify", tmp_path / "trained", tmp_path / "exported")
    convert("import", "--hf", tmp_path / "exported", "--variant", variant, "--out", tmp_path / "imported")
    assert "bit for bit" in convert("verify", tmp_path / "trained", tmp_path / "imported")
    text = (tmp_path / "imported" / "config.yaml").read_text()
    assert "language: tiny_qwen3" in text and "vision: tiny_siglip" in text and "tile_size: 70" in text

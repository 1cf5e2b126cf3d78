"""What one GPU computes is what the CPU computes: losses, resumed runs, answers. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_nvlm.ops.causal_attention import causal_attention
from megatron_nvlm.ops.interval_attention import interval_attention
from tests.support.launch import launch
from tests.support.shards import read_metrics, write_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]

TRAIN = "megatron_nvlm.train"
STEPS = 6
FAMILIES = {
    "Qwen2 with InternViT": {},
    "Qwen3 with SigLIP": {"language": "tiny_qwen3", "vision": "tiny_siglip"},
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of float32 would else be rounded to TF32."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def train(path: Path, run_dir: Path, on_gpu: bool, monkeypatch: pytest.MonkeyPatch, *keys: str) -> list[float]:
    """Run; returns the losses of all its steps."""
    with monkeypatch.context() as context:
        if not on_gpu:
            context.setenv("CUDA_VISIBLE_DEVICES", "")
        launch(TRAIN, 1, "--config", str(path), f"run_dir={run_dir}", f"optimizer.decay_steps={STEPS}", *keys)
    return [row["loss"] for row in read_metrics(run_dir)]


@pytest.mark.parametrize("variant", "dxh")
@pytest.mark.parametrize("family", FAMILIES)
def test_losses(family: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = {"tile_size": 70} if "SigLIP" in family else {}
    path = write_run(tmp_path, model={"variant": variant, **FAMILIES[family]}, tiling=tiling)
    losses = [train(path, tmp_path / str(on_gpu), on_gpu, monkeypatch) for on_gpu in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, training={"precision": "bf16"})
    losses = [train(path, tmp_path / str(on_gpu), on_gpu, monkeypatch) for on_gpu in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("first_on_gpu", [True, False])
@pytest.mark.parametrize("then_on_gpu", [True, False])
def test_checkpoints_pass_between_gpu_and_cpu(
    first_on_gpu: bool, then_on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (first_on_gpu or then_on_gpu):
        pytest.skip("tests/checkpoint does")
    path = write_run(tmp_path)
    whole = train(path, tmp_path / "whole", then_on_gpu, monkeypatch)
    train(path, tmp_path / "parts", first_on_gpu, monkeypatch, "training.train_steps=4")
    parts = train(path, tmp_path / "parts", then_on_gpu, monkeypatch)
    assert len(parts) == STEPS and parts == pytest.approx(whole, rel=1e-4)


def test_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_dir = write_run(tmp_path), tmp_path / "run"
    train(path, run_dir, True, monkeypatch)
    Image.radial_gradient("L").resize((112, 168)).convert("RGB").save(tmp_path / "one.png")
    question = ("--image", str(tmp_path / "one.png"), "--question", "What?", "--max-new-tokens", "12")
    answers = []
    for visible in ("0", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        answers.append(launch("megatron_nvlm.generate", 1, "--run-dir", str(run_dir), *question).stdout)
    assert answers[0] == answers[1] and answers[0].strip()


@pytest.mark.parametrize("heads", [(8, 2), (6, 6)])
def test_attention(heads: tuple[int, int]) -> None:
    """Both forms of attention, with a token that sees nothing, and their gradients."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(40, heads[0], 64, generator=generator)
    key, value = (torch.randn(40, heads[1], 64, generator=generator) for _ in range(2))
    intervals = torch.tensor([[0, 12]] * 15 + [[3, 3]] * 5 + [[12, 40]] * 20, dtype=torch.int32)
    found = []
    for device in ("cuda", "cpu"):
        inputs = [tensor.to(device).requires_grad_() for tensor in (query, key, value)]
        crossed = interval_attention(*inputs, intervals.to(device))
        attended = causal_attention(*inputs, [0, 17, 40])
        (crossed.square().sum() + attended.square().sum()).backward()
        found.append([crossed, attended, *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert (ours.cpu() - theirs).norm() <= 1e-5 * theirs.norm()

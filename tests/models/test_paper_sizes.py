"""The paper's 34B and 72B runs: each file is valid, and its model, built without memory, has the right size."""

from pathlib import Path

import pytest
import torch

from megatron_nvlm.config.load import load_run
from megatron_nvlm.models.build import build_model
from megatron_nvlm.models.initialise import count_parameters
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.parallel.groups import get_groups, get_single_rank_groups
from megatron_nvlm.runs.resolve import resolve_run
from megatron_nvlm.training.trainable import RECIPES

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER_RUNS = sorted(path.stem for path in CONFIGS.glob("*_nvlm_*.yaml"))

# From the configurations of the public models, counted by hand:
# layers * (attention + SwiGLU + two norms) + embedding + output + last norm.
QWEN2_72B = 80 * (8192 * (8192 + 2 * 1024) + (8192 + 2 * 1024) + 8192**2 + 3 * 8192 * 29568 + 2 * 8192) + (
    2 * 152064 * 8192 + 8192
)
YI_34B = 60 * (7168 * (7168 + 2 * 1024) + 7168**2 + 3 * 7168 * 20480 + 2 * 7168) + 2 * 64000 * 7168 + 7168
# InternViT-6B: 45 layers; QKV without bias, output projection and MLP with; two norms, two layer-scales, norms of Q and K.
INTERNVIT_6B = (
    45 * (3 * 3200**2 + 3200**2 + 3200 + 2 * 3200 * 12800 + 12800 + 3200 + 6 * 3200)
    + 3 * 14**2 * 3200
    + 3200
    + 3200
    + 1025 * 3200
)
LANGUAGE = {"34b": (YI_34B, 7168, 20480, 1024), "72b": (QWEN2_72B, 8192, 29568, 1024)}


def test_the_public_totals() -> None:
    assert QWEN2_72B == 72_706_203_648  # as Hugging Face counts Qwen2-72B-Instruct
    assert YI_34B == 34_388_917_248  # and Yi-34B


def test_all_runs_of_the_paper_are_there() -> None:
    expected = [f"{s}_nvlm_{v}_{n}" for s in ("pretrain", "sft") for v in "dhx" for n in ("34b", "72b")]
    assert expected == PAPER_RUNS


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_run_is_valid_and_its_model_has_the_right_size(name: str, world_of_one: Device) -> None:
    run = load_run(CONFIGS / f"{name}.yaml", ["model.backend=local"])
    resolved = resolve_run(run, world_size=128)
    model = build_model(
        resolved.model,
        ParallelismConfig(),
        get_groups(),
        get_single_rank_groups(),
        torch.bfloat16,
        torch.device("meta"),
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    stage, variant, size = name.split("_")[0], name.split("_")[2], name.split("_")[3]
    language, width, ffn, kv_width = LANGUAGE[size]
    projector = 12800 * width if variant == "x" else 2 * 12800 + 12800 * ffn + ffn * width
    expected = {"vision_model": INTERNVIT_6B, "vision_projection": projector, "language_model": language}
    if variant != "d":
        # 10 layers of Wq, Wk, Wv, Wo, a norm and a gate
        expected["cross_attention"] = 10 * (2 * width**2 + 2 * width * kv_width + width + 1)
    assert count_parameters(model) == expected
    assert run.recipe.trainable_components() == RECIPES[stage]

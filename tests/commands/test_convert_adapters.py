"""Adapters in and out by the real command: PEFT's folders, merged weights, and weights without them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_nvlm.evaluation.score_cases import Case
from megatron_nvlm.evaluation.score_model import open_scored, score_case
from megatron_nvlm.hf.adapters import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from tests.commands.conversions import convert, keep_groups, parts
from tests.hf.test_older_transformers import install
from tests.support.launch import environment

__all__ = ["keep_groups", "parts"]

RANK, ALPHA = 3, 4.5
SHAPES = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
SHAPES |= {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}
"""Inputs and outputs of the linear layers of the small language model."""
LANGUAGE = "base_model.model.model."
TOLERANCE = 5e-5


def peft_folder(folder: Path, targets: tuple[str, ...] = tuple(SHAPES), prefix: str = LANGUAGE, **says: Any) -> Path:
    """Adapters of the small language model as PEFT writes them, with random numbers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    weights: dict[str, Tensor] = {}
    for layer in range(2):
        for target in targets:
            inputs, outputs = SHAPES[target]
            module = "mlp" if inputs == 24 or outputs == 24 else "self_attn"
            name = f"{prefix}layers.{layer}.{module}.{target}"
            weights[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, inputs, generator=generator)
            weights[f"{name}.lora_B.weight"] = 0.3 * torch.randn(outputs, RANK, generator=generator)
    save_file(weights, folder / ADAPTER_FILE)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "init_lora_weights": True,
    }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({**described, **says}))
    return folder


def merge_by_hand(language: dict[str, Tensor], adapters: Path) -> dict[str, Tensor]:
    """The language model's weights with B A added, by their names."""
    merged, weights = dict(language), load_file(adapters / ADAPTER_FILE)
    for name, a in weights.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged[f"{layer}.weight"] = language[f"{layer}.weight"] + ALPHA / RANK * (
                weights[name.replace("lora_A", "lora_B")] @ a
            )
    return merged


@pytest.mark.parametrize("targets", [tuple(SHAPES), ("k_proj", "up_proj")], ids=["all", "some"])
def test_a_peft_folder_goes_in_and_out(parts: tuple[object, ...], tmp_path: Path, targets: tuple[str, ...]) -> None:
    adapters, run = peft_folder(tmp_path / "peft", targets), tmp_path / "run"
    cross = "model.cross_attention.interval=2"
    assert convert("import", *parts, "--adapters", adapters, "--variant", "h", "--out", run, cross) == 0
    export = ("export", "--checkpoint", run, "--out")
    for kind in ("merged", "without", "alone"):
        assert convert(*export, tmp_path / kind, "--adapters", kind) == 0
    language = load_file(tmp_path / "language" / "model.safetensors")
    merged, without = (load_file(tmp_path / kind / "model.safetensors") for kind in ("merged", "without"))
    for name, wanted in merge_by_hand(language, adapters).items():
        assert torch.equal(without[f"language_model.{name}"], language[name])
        torch.testing.assert_close(merged[f"language_model.{name}"], wanted, msg=name)
    assert merged.keys() == without.keys()
    others = [name for name in merged if "language_model.model.layers" not in name]
    assert others and all(torch.equal(merged[name], without[name]) for name in others)
    theirs, ours = load_file(adapters / ADAPTER_FILE), load_file(tmp_path / "alone" / ADAPTER_FILE)
    whole = {name.replace(LANGUAGE, "base_model.model.language_model.model."): theirs[name] for name in theirs}
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in ours)
    # What was written is read again, and the weights without them are those of a model that never had any.
    again, plain = tmp_path / "again", tmp_path / "plain"
    assert convert("import", *parts, "--adapters", tmp_path / "alone", "--variant", "h", "--out", again, cross) == 0
    assert convert("verify", run, again) == 0
    assert convert("import", "--hf", tmp_path / "without", "--variant", "h", "--out", plain) == 0
    assert convert("verify", plain, tmp_path / "without") == 0


def test_a_run_with_adapters_computes_what_the_merged_folder_does(parts: tuple[object, ...], tmp_path: Path) -> None:
    adapters, run, merged = peft_folder(tmp_path / "peft"), tmp_path / "run", tmp_path / "merged"
    assert convert("import", *parts, "--adapters", adapters, "--variant", "d", "--out", run) == 0
    assert convert("export", "--checkpoint", run, "--out", merged) == 0
    ids = torch.arange(12)[None] * 3 % 40
    case = Case("text", {"input_ids": ids, "labels": ids}, None)
    with_adapters = score_case(open_scored(run, None, 1, 1, "fp32"), case, gradients=True)
    alone = score_case(open_scored(None, merged, 1, 1, "fp32"), case, gradients=False)
    assert (with_adapters["logits"] - alone["logits"]).abs().max() <= TOLERANCE
    plain = tmp_path / "plain"
    assert convert("import", *parts, "--variant", "d", "--out", plain) == 0
    without = score_case(open_scored(plain, None, 1, 1, "fp32"), case, gradients=False)
    assert (without["logits"] - alone["logits"]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "says,words",
    [
        ({"peft_type": "LOHA"}, "says peft_type 'LOHA'; only LORA is read"),
        ({"use_rslora": True}, "says use_rslora True, which is not known here"),
        ({"use_dora": True}, "says use_dora True"),
        ({"bias": "all"}, "says bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "says modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "says rank_pattern"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights 'pissa'"),
        ({"alora_invocation_tokens": [3]}, "says alora_invocation_tokens"),
        ({"key_of_tomorrow": 1}, "says key_of_tomorrow 1"),
        ({"lora_alpha": "x"}, 'says lora_alpha "x"; it must be a number'),
        ({"r": 2.5}, "says r 2.5; it must be a whole number"),
        ({"r": 4}, "other shapes"),
    ],
)
def test_what_is_not_known_is_refused(
    parts: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], says: dict[str, Any], words: str
) -> None:
    adapters = peft_folder(tmp_path / "peft", **says)
    assert convert("import", *parts, "--adapters", adapters, "--variant", "d", "--out", tmp_path / "run") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


def test_missing_and_unknown_matrices_are_named(
    parts: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = peft_folder(tmp_path / "peft", ("q_proj",))
    weights = load_file(adapters / ADAPTER_FILE)
    command = ("import", *parts, "--adapters", adapters, "--variant", "d", "--out", tmp_path / "run")
    extra = {"base_model.model.lm_head.lora_A.weight": torch.zeros(RANK, 16)}
    save_file({**weights, **extra}, adapters / ADAPTER_FILE)
    assert convert(*command) == 2 and "unknown: base_model.model.lm_head.lora_A.weight" in capsys.readouterr().err
    weights.pop(f"{LANGUAGE}layers.1.self_attn.q_proj.lora_B.weight")
    save_file(weights, adapters / ADAPTER_FILE)
    assert convert(*command) == 2 and "lacks 1 tensors" in capsys.readouterr().err
    save_file({"a.weight": torch.zeros(1)}, adapters / ADAPTER_FILE)
    assert convert(*command) == 2 and "has adapters of 0 language models" in capsys.readouterr().err
    (adapters / ADAPTER_FILE).unlink()
    assert convert(*command) == 2 and f"name a folder with {ADAPTER_FILE}" in capsys.readouterr().err


def test_adapters_of_a_run_without_any(
    parts: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("import", *parts, "--variant", "d", "--out", tmp_path / "run") == 0
    assert convert("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--adapters", "alone") == 2
    assert "has no adapters" in capsys.readouterr().err


PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapters, merged = sys.argv[1:]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(12)[None] * 3 % 40
with torch.no_grad():
    plain, wanted = load(base)(input_ids=ids).logits, load(merged)(input_ids=ids).logits
    model = PeftModel.from_pretrained(load(base), adapters)
    names = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    found = model(input_ids=ids).logits
    assert len(names) == 14, names
    assert (found - wanted).abs().max() < 5e-5 < (found - plain).abs().max()
    model = model.merge_and_unload()
    assert (model(input_ids=ids).logits - wanted).abs().max() < 5e-5
model = PeftModel.from_pretrained(load(base), adapters)
model.save_pretrained(adapters + "_saved")
"""


@pytest.mark.slow
def test_peft_itself_reads_what_is_written_and_is_read(parts: tuple[object, ...], tmp_path: Path) -> None:
    packages = install(tmp_path, "peft", "accelerate")
    adapters, run = peft_folder(tmp_path / "mine"), tmp_path / "run"
    cross = "model.cross_attention.interval=2"
    assert convert("import", *parts, "--adapters", adapters, "--variant", "x", "--out", run, cross) == 0
    folders = [tmp_path / kind for kind in ("without", "alone", "merged")]
    for folder in folders:
        assert convert("export", "--checkpoint", run, "--out", folder, "--adapters", folder.name) == 0
    own = {"PYTHONPATH": os.pathsep.join([str(packages)]), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PEFT, *map(str, folders)]
    done = subprocess.run(command, env={**environment(), **own}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    saved = tmp_path / "alone_saved"
    assert convert("import", *parts, "--adapters", saved, "--variant", "x", "--out", again, cross) == 0
    assert convert("verify", run, again) == 0

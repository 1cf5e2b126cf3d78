"""What convert_checkpoint refuses, asks for, or finds different: one sentence, and nothing half done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nvlm.commands import score as score_tool
from megatron_nvlm.config.load import load_run
from tests.commands.conversions import convert, keep_groups, parts

__all__ = ["keep_groups", "parts"]


def test_used_padding_heads_are_refused(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dirty = tmp_path / "dirty"
    shutil.copytree(reference / "nvlm_d_tiny", dirty)
    dirty.chmod(0o755)
    weights = load_file(dirty / "dirty_dummy_vit.safetensors")
    for path in sorted(dirty.glob("model-*.safetensors")):
        stored = load_file(path)
        path.chmod(0o644)
        save_file({name: weights.get(name, tensor) for name, tensor in stored.items()}, path)
    for extra in ("dirty_dummy_vit", "inputs", "outputs", "eps_probe_outputs", "grads_case1"):
        (dirty / f"{extra}.safetensors").unlink()
    assert convert("import", "--hf", dirty, "--variant", "d", "--out", tmp_path / "run") == 2
    assert "padding heads hold numbers other than zero" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_unknown_template_is_asked_for(
    tmp_path: Path, parts: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    assert convert("import", *parts, "--variant", "d", "--out", run) == 0
    assert convert("export", "--checkpoint", run, "--out", folder) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "template": "internlm2-chat"}))
    whole = ("import", "--hf", folder, "--variant", "d", "--out", tmp_path / "again")
    assert convert(*whole) == 2
    assert "template 'internlm2-chat', which is not known here; give data.template=" in capsys.readouterr().err
    assert convert(*whole, "data.template=plain") == 0
    assert load_run(tmp_path / "again" / "config.yaml").data.template == "plain"


def test_verify_says_what_differs(
    tmp_path: Path, parts: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tmp_path / "vision", tmp_path / "other")
    stored = load_file(tmp_path / "vision" / "model.safetensors")
    stored["encoder.layers.0.ls1"][3] += 0.5
    del stored["encoder.layers.0.ls2"]
    stored["encoder.layers.0.norm1.weight"] = stored["encoder.layers.0.norm1.weight"].bfloat16()
    save_file(stored, tmp_path / "other" / "model.safetensors")
    assert convert("verify", tmp_path / "vision", tmp_path / "other") == 1
    printed = capsys.readouterr().out
    assert "encoder.layers.0.ls1: 1 of 16 numbers differ, by 0.5 at most" in printed
    assert "encoder.layers.0.ls2: only in the first" in printed
    assert "encoder.layers.0.norm1.weight: float32 and bfloat16; " in printed
    assert "3 of " in printed


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "lacks 1 tensors, model.layers.1.mlp.up_proj.weight"),
        ({"add": "model.layers.0.self_attn.rotary"}, "1 tensors of .* belong to nothing"),
        ({"config": {"tie_word_embeddings": True}}, "lm_head.weight among them"),
        ({"config": {"vocab_size": 48}}, "tensors of other shapes, language_model.embedding"),
        ({"config": {"num_hidden_layers": 3}}, "lacks 12 tensors"),
        (
            {
                "shapes": {
                    "model.layers.0.self_attn.q_proj.weight": (15, 16),
                    "model.layers.1.mlp.up_proj.weight": (24, 9),
                }
            },
            r"2 weights of impossible shapes: model.layers.0.self_attn.q_proj.weight \[15, 16\] and .* cannot make",
        ),
        (
            {"shapes": {"model.layers.0.self_attn.o_proj.weight": (16, 8)}},
            "tensors of other shapes, language_model.decoder",
        ),
        ({"config": {"logit_scale": 2.0}}, "the language model: logit_scale is not known here"),
        ({"config": {"layer_types": ["full_attention", "chunked_attention"]}}, "full_attention in every layer"),
        ({"config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised weights are not read"),
        ({"config": {"architectures": ["GPT2LMHeadModel"]}}, "is of GPT2LMHeadModel, which is not supported"),
        (
            {"config": {"rope_parameters": {"rope_type": "yarn"}, "architectures": ["LlamaForCausalLM"]}},
            "rotary .*yarn",
        ),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path,
    parts: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    sentence: str,
) -> None:
    """One sentence, the full list of findings, and nothing that looks like a checkpoint."""
    import re

    path, config = tmp_path / "language" / "model.safetensors", tmp_path / "language" / "config.json"
    stored = load_file(path)
    if "drop" in change:
        del stored[change["drop"]]
    if "add" in change:
        stored[change["add"]] = torch.ones(2)
    stored |= {name: torch.ones(shape) for name, shape in change.get("shapes", {}).items()}
    save_file(stored, path, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **change.get("config", {})}))
    assert convert("import", *parts, "--variant", "d", "--out", tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert re.search(sentence, printed.splitlines()[-1]), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "config.yaml").exists() and not list((tmp_path / "run").glob("checkpoints/step*"))


def test_what_is_asked_for_has_to_make_sense(
    tmp_path: Path, parts: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert convert("import", *parts[:2], "--variant", "d", "--out", run) == 2
    assert "both --language-model and --vision-model are needed" in capsys.readouterr().err
    assert convert("import", "--hf", tmp_path / "nowhere", "--variant", "d", "--out", run) == 2
    assert "no Hugging Face folder" in capsys.readouterr().err
    assert convert("export", "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert convert("import", *parts, "--variant", "x", "--out", run, "model.cross_attention.interval=2") == 0
    assert convert("import", *parts, "--variant", "x", "--out", run, "model.cross_attention.interval=2") == 2
    assert "is there already" in capsys.readouterr().err
    assert convert("export", "--checkpoint", run, "--out", tmp_path / "x") == 0
    capsys.readouterr()
    assert convert("import", "--hf", tmp_path / "x", "--variant", "h", "--out", tmp_path / "h") == 2
    assert "holds NVLM-X and model.variant is h" in capsys.readouterr().err
    heads = "model.cross_attention.num_attention_heads=2"
    assert convert("import", "--hf", tmp_path / "x", "--variant", "x", "--out", tmp_path / "h", heads) == 2
    assert "has cross-attention in layers [1] with 4 heads, 2 groups and qk_norm False" in capsys.readouterr().err
    (tmp_path / "language" / "model.safetensors").write_bytes(b"broken")
    assert convert("import", *parts, "--variant", "d", "--out", tmp_path / "d") == 2
    assert "is broken" in capsys.readouterr().err
    assert score_tool.main(["--inputs", str(run), "--out", "x"]) == 2

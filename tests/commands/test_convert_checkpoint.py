"""Weights in and out by the real commands: what goes in computes the same, and comes out as it was, bit for bit."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_nvlm.config.load import load_run
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.score_cases import Case
from megatron_nvlm.evaluation.score_model import open_scored, score_case
from megatron_nvlm.hf.safetensors_files import SafetensorsFolder
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.commands.conversions import convert, keep_groups, parts, small_vision
from tests.support.folders import FAMILIES, language_folder, siglip_folder
from tests.support.launch import environment, run_command
from tests.text.test_sentencepiece_model import train as train_sentencepiece

__all__ = ["keep_groups", "parts"]

ABSOLUTE, LOSS, RELATIVE = 5e-5, 1e-5, 1e-4


def run_score(*arguments: object) -> None:
    run_command("megatron_nvlm.commands.score", *arguments)


def check_scores(folder: Path, found: dict[str, Tensor]) -> None:
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    for case in ("case1", "case2", "case3"):
        ids = inputs[f"{case}.input_ids"]
        real = inputs.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
        difference = (found[f"{case}.logits"] - outputs[f"{case}.logits"])[real].abs().max()
        assert difference <= ABSOLUTE, case
        assert (found[f"{case}.loss"] - outputs[f"{case}.loss"]).abs() <= LOSS
    for name in ("vit_features", "pixel_shuffled", "mlp1_out"):
        assert (found[f"case1.{name}"] - outputs[f"case1.{name}"]).abs().max() <= ABSOLUTE
    gradients = load_file(folder / "grads_case1.safetensors")
    gradients.pop("__input__.pixel_values")
    for name, gradient in gradients.items():
        gap = (found[f"case1.grad.{name}"] - gradient).norm()
        assert gap <= RELATIVE * gradient.norm(), name


@pytest.mark.distributed
def test_the_release_goes_in_and_out(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores at four layouts, straight from the folder too; the exported folder is the original and scores the same."""
    folder, run, out = reference / "nvlm_d_tiny", tmp_path / "run", tmp_path / "out"
    assert convert("import", "--hf", folder, "--variant", "d", "--out", run) == 0
    assert convert("inspect", run, folder) == 0
    assert "1,375,424" in capsys.readouterr().out
    assert convert("export", "--checkpoint", run, "--out", out, "--file-gigabytes", 0.001) == 0
    assert convert("verify", out, folder) == convert("verify", run, folder) == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    inputs = ("--inputs", folder / "inputs.safetensors", "--gradients")
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        layout = ("--tensor-parallel", tensor, "--pipeline-parallel", pipeline)
        run_score("--checkpoint", run, *inputs, *layout, "--out", tmp_path / "scores.safetensors")
        check_scores(folder, load_file(tmp_path / "scores.safetensors"))
    run_score("--hf", out, *inputs, "--tensor-parallel", 2, "--out", tmp_path / "scores.safetensors")
    check_scores(folder, load_file(tmp_path / "scores.safetensors"))


@st.composite
def language_sizes(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.integers(1, 3))
    return {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "hidden_size": heads * 2 * draw(st.integers(2, 4)),
        "intermediate_size": draw(st.integers(5, 40)),
        "vocab_size": draw(st.integers(20, 90)),
    }


ROPE: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0},
}
"""Kinds of rotary embedding, of a model that was trained on four tokens first."""


@st.composite
def language_models(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family, and the settings of one of its models."""
    settings: dict[str, Any] = {**draw(language_sizes()), "tie_word_embeddings": draw(st.booleans())}
    scaling = ROPE[draw(st.sampled_from(list(ROPE)))]
    if scaling:
        settings["rope_parameters"] = {"rope_theta": 100.0, "original_max_position_embeddings": 4, **scaling}
    return draw(st.sampled_from(list(FAMILIES))), settings


def small_siglip(folder: Path, heads: int, layers: int) -> Any:
    """Of 3 x 3 patches and two pixels more."""
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 20, "image_size": 44, "patch_size": 14}
    return siglip_folder(folder, num_attention_heads=heads, num_hidden_layers=layers, **sizes)


@settings(max_examples=20)
@given(language_models(), st.sampled_from(["6b", "300m", "siglip"]), st.integers(1, 3), st.integers(1, 2))
def test_random_sizes_of_every_family(
    model: tuple[str, dict[str, Any]], encoder: str, vision_heads: int, vision_layers: int
) -> None:
    """Made by transformers: logits and encoder features are theirs, and every tensor comes out as it went in."""
    family, sizes = model
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        language = language_folder(base / "language", family, **sizes)
        is_siglip = encoder == "siglip"
        if is_siglip:
            vision = small_siglip(base / "vision", vision_heads, vision_layers)
        else:
            vision = small_vision(base / "vision", encoder == "6b", vision_heads, vision_layers)
        size = 44 if is_siglip else 28
        parts = ("--language-model", base / "language", "--vision-model", base / "vision")
        assert convert("import", *parts, "--variant", "d", "--out", base / "run") == 0
        ids = torch.randint(0, sizes["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
        scored = open_scored(base / "run", None, 1, 1, "fp32")
        found = score_case(scored, Case("text", {"input_ids": ids, "labels": ids}, None), gradients=False)
        with torch.no_grad():
            theirs = language(input_ids=ids, labels=ids)
            features = vision(pixels).last_hidden_state[:, 0 if is_siglip else 1 :]
            ours = scored.model.encode_patches(pixels)
        assert (found["logits"] - theirs.logits).abs().max() <= ABSOLUTE
        assert abs(float(found["loss"]) - float(theirs.loss)) <= LOSS
        assert (ours - features).abs().max() <= ABSOLUTE
        assert convert("export", "--checkpoint", base / "run", "--out", base / "out") == 0
        out = SafetensorsFolder(base / "out")
        for prefix, part in (("language_model.", "language"), ("vision_model.", "vision")):
            stored = SafetensorsFolder(base / part)
            used = {name: info for name, info in stored.infos.items() if not name.startswith("head.")}
            for name, info in used.items():
                written = out.read(prefix + name)
                if written.shape == info.shape:
                    assert torch.equal(written, stored.read(name)), name
                else:  # the release's folders have heads of zeros after the real ones
                    assert encoder == "6b" and "attn" in name
            assert {name for name in out.infos if name.startswith(prefix)} == {prefix + name for name in used}


@pytest.mark.distributed
def test_a_vocabulary_that_ranks_do_not_divide(tmp_path: Path) -> None:
    sizes = dict(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    language = language_folder(tmp_path / "language", "qwen2", vocab_size=43, **sizes)
    small_vision(tmp_path / "vision", is_6b=True)
    parts = ("--language-model", tmp_path / "language", "--vision-model", tmp_path / "vision")
    assert (
        convert("import", *parts, "--variant", "x", "--out", tmp_path / "run", "model.cross_attention.interval=2") == 0
    )
    ids = torch.arange(12)[None] * 3
    save_file({"one.input_ids": ids, "one.labels": ids.clone()}, tmp_path / "in.safetensors")
    out = tmp_path / "scores.safetensors"
    run_score(
        "--checkpoint", tmp_path / "run", "--inputs", tmp_path / "in.safetensors", "--out", out, "--tensor-parallel", 2
    )
    with torch.no_grad():
        theirs = language(input_ids=ids, labels=ids)
    found = load_file(out)
    assert (found["one.logits"] - theirs.logits).abs().max() <= ABSOLUTE  # a new gate is closed: the language model's
    assert abs(float(found["one.loss"]) - float(theirs.loss)) <= LOSS


def test_x_and_h_come_out_and_go_in_again(tmp_path: Path, parts: tuple[object, ...]) -> None:
    for variant in "xh":
        run, out, again = (tmp_path / f"{name}_{variant}" for name in ("run", "out", "again"))
        interval = "model.cross_attention.interval=2"
        tiling = ("thumbnail_tag=<whole>", "tag_format=2d_box", "max_tiles=4", "background=white")
        tiling = tuple(f"tiling.{key}" for key in tiling)
        assert convert("import", *parts, "--variant", variant, "--out", run, interval, *tiling, "--dtype", "bf16") == 0
        assert convert("export", "--checkpoint", run, "--out", out) == 0
        assert convert("import", "--hf", out, "--variant", variant, "--out", again) == 0
        assert convert("verify", run, again) == convert("verify", out, again) == 0
        config = json.loads((out / "config.json").read_text())
        assert config["cross_attention"]["layers"] == [1] and config["torch_dtype"] == "bfloat16"
        assert load_run(again / "config.yaml").tiling == TilingConfig(28, 4, "2d_box", "<whole>", "white")


def test_killed_halfway_it_goes_on(tmp_path: Path) -> None:
    """No folder that looks complete is left; the same command ends with the same bytes."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=4)
    language_folder(tmp_path / "language", "qwen2", vocab_size=8192, num_hidden_layers=8, **sizes)
    small_vision(tmp_path / "vision", is_6b=True)
    parts = ["--language-model", str(tmp_path / "language"), "--vision-model", str(tmp_path / "vision")]

    def interrupt(arguments: list[str], working: Path, pattern: str, final: Path) -> None:
        command = [sys.executable, "-m", "megatron_nvlm.commands.convert_checkpoint", *arguments]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(working.glob(pattern)):
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not final.exists() and working.exists()

    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    arguments = ["import", *parts, "--variant", "d", "--out", str(run)]
    interrupt(arguments, checkpoints / ".step_00000000.partial", "*.distcp", checkpoints / "step_00000000")
    first = next((checkpoints / ".step_00000000.partial").glob("*.distcp"))
    written = first.stat().st_mtime_ns
    assert convert(*arguments) == 0
    assert (checkpoints / "step_00000000" / first.name).stat().st_mtime_ns == written  # not made again
    export = ["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--file-gigabytes", "0.05"]
    interrupt(export, tmp_path / ".out.partial", "*.safetensors", tmp_path / "out")
    assert convert(*export) == 0
    assert convert("verify", run, tmp_path / "out") == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".") or "conversion" in path.name]


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    pytest.importorskip("sentencepiece")
    language_folder(tmp_path / "language", "llama", vocab_size=700, **sizes)
    small_vision(tmp_path / "vision", is_6b=True)
    model = train_sentencepiece(tmp_path / "language")
    parts = ("--language-model", tmp_path / "language", "--vision-model", tmp_path / "vision")
    assert convert("import", *parts, "--variant", "d", "--out", tmp_path / "run") == 0
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").vocab_size == 700
    assert convert("tokenizer", model, "--out", tmp_path / "alone.json") == 0
    assert (tmp_path / "alone.json").read_text() == (tmp_path / "run" / "tokenizer.json").read_text()
    assert "700 ids" in capsys.readouterr().out
    with pytest.raises(UserError, match="nvlm-convert-checkpoint tokenizer"):
        Tokenizer.load(model)

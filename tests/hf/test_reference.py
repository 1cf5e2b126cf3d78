"""The model file opens a folder of NVLM-D's release and computes what the original code computed.

The numbers stand beside the repository and are not part of it; without them these tests are skipped and say so.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_nvlm.hf.exported_code.modeling_nvlm import NVLM_D_Model


@pytest.fixture(scope="module")
def folder(reference: Path) -> Path:
    return reference / "nvlm_d_tiny"


@pytest.fixture(scope="module")
def model(folder: Path) -> NVLM_D_Model:
    loaded = NVLM_D_Model.from_pretrained(folder, dtype=torch.float32).eval()
    loaded.img_context_token_id = int(load_file(folder / "inputs.safetensors")["img_context_token_id"])
    return loaded


def inputs_of(folder: Path, case: str) -> dict[str, Tensor]:
    inputs = load_file(folder / "inputs.safetensors")
    return {name.split(".")[1]: value for name, value in inputs.items() if name.startswith(f"{case}.")}


@pytest.mark.parametrize("case", ["case1", "case2", "case3"])
def test_logits_and_loss(folder: Path, model: NVLM_D_Model, case: str) -> None:
    """Several tiles; two padded rows; text only; asked as the release is, with image_flags and a placeholder."""
    inputs, expected = inputs_of(folder, case), load_file(folder / "outputs.safetensors")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(output.logits[real], expected[f"{case}.logits"][real], rtol=0, atol=5e-5)
    torch.testing.assert_close(output.loss, expected[f"{case}.loss"][0], rtol=0, atol=1e-5)
    for number, state in enumerate(output.hidden_states):
        if f"{case}.llm_hidden_{number}" in expected:
            torch.testing.assert_close(state, expected[f"{case}.llm_hidden_{number}"], rtol=0, atol=5e-5)


def test_gradients(folder: Path) -> None:
    """Every weight's, so that the model can be trained where it stands."""
    model = NVLM_D_Model.from_pretrained(folder, dtype=torch.float32)
    model.img_context_token_id = int(load_file(folder / "inputs.safetensors")["img_context_token_id"])
    model(**inputs_of(folder, "case1")).loss.backward()
    expected = load_file(folder / "grads_case1.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_answer(folder: Path, model: NVLM_D_Model, use_cache: bool) -> None:
    expected, inputs = load_file(folder / "outputs.safetensors"), inputs_of(folder, "case1")
    prompt = inputs["input_ids"][:, : int(expected["gen.prompt_len"])]
    length = expected["gen.ids"].shape[1]
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, use_cache=use_cache)
    ids = model.generate(prompt, pixel_values=inputs["pixel_values"], max_new_tokens=length, **options)
    assert torch.equal(ids[:, prompt.shape[1] :], expected["gen.ids"])


def test_saved_again_it_has_the_same_bits(folder: Path, model: NVLM_D_Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before: dict[str, Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_tiles_that_flags_leave_out(folder: Path, model: NVLM_D_Model) -> None:
    inputs = inputs_of(folder, "case1")
    with torch.no_grad():
        expected = model(**inputs).logits
        spare = torch.zeros_like(inputs["pixel_values"][:1])
        inputs["pixel_values"] = torch.cat([spare, inputs["pixel_values"]])
        inputs["image_flags"] = torch.cat([torch.zeros(1, 1, dtype=torch.long), inputs["image_flags"]])
        assert torch.equal(model(**inputs).logits, expected)


def test_wrong_numbers_of_places_are_refused(folder: Path, model: NVLM_D_Model) -> None:
    inputs = inputs_of(folder, "case1")
    with pytest.raises(ValueError, match=r"sample 0 has 16 places for vision tokens and 12 vision tokens"):
        model(inputs["input_ids"], inputs["pixel_values"][:3])
    two = inputs_of(folder, "case2")
    with pytest.raises(ValueError, match=r"pixel_values has 4 tiles and the 2 samples have"):
        model(two["input_ids"], two["pixel_values"][:4])
    with pytest.raises(ValueError, match=r"takes tiles of \[3, 56, 56\]"):
        model(inputs["input_ids"], inputs["pixel_values"][..., :28])

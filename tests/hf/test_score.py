"""tools/score.py on what the processor gives: a ragged, padded batch, several images, for every variant."""

from pathlib import Path

import pytest
import torch

from megatron_nvlm.evaluation.score_cases import Case
from megatron_nvlm.evaluation.score_model import open_scored, score_case
from megatron_nvlm.parallel.device import Device
from tests.hf.folders import PROMPTS, VARIANT_NAMES
from tests.hf.test_model import make_pair
from tests.support.tiny import tiny_config


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_scores_are_the_transformers_models_logits(tmp_path: Path, world_of_one: Device, variant: str) -> None:
    pair = make_pair(tmp_path / "folder", tiny_config(variant), world_of_one, torch.float32)
    inputs = pair.inputs(list(PROMPTS.values()))
    with torch.no_grad():
        expected = pair.theirs(**inputs).logits
    scored = open_scored(None, tmp_path / "folder", 1, 1, "fp32")
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    found = score_case(scored, Case("batch", tensors, None), gradients=False)["logits"]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=5e-5)
    assert not found[~real].any()

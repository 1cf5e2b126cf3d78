"""An exported folder answers the same in every version of transformers that it is for, by Auto classes and its own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.folders import VARIANT_NAMES
from tests.support.launch import environment

OLDER = {
    "4.46.3": ("transformers==4.46.3", "tokenizers>=0.20,<0.21", "huggingface_hub<1"),
    "4.57.1": ("transformers==4.57.1", "tokenizers>=0.22,<0.23", "huggingface_hub<1"),
}
SCRIPT = """
import json, sys
import numpy as np, transformers
from PIL import Image
folder = sys.argv[1]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 180, 3), dtype=np.uint8))
inputs = processor(text="<image>\\nWhat is this?", images=[picture])
answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
said = model.chat(tokenizer, inputs["pixel_values"], "What is this?", {"max_new_tokens": 6, "do_sample": False})
assert said == processor.decode_answers(inputs, answer)[0].strip()
print(json.dumps([transformers.__version__, inputs["input_ids"].tolist(), answer.tolist(), said]))
"""


def install(folder: Path, *requirements: str) -> Path:
    """Packages beside this environment; the test is skipped where pip does not find them."""
    packages = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(requirements)}: {done.stderr.splitlines()[-1:]}")
    return packages


def ask(folder: Path, cache: Path, packages: Path | None) -> list[object]:
    path = [] if packages is None else [str(packages)]
    # Nothing of this repository on the path: the folder's code is to stand alone.
    own = {"PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env={**environment(), **own}, cwd=cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_it_answers_the_same_in_older_versions(folders: Path, tmp_path: Path, version: str) -> None:
    packages = install(tmp_path, *OLDER[version])
    for variant in VARIANT_NAMES:
        caches = [tmp_path / f"{variant}_{name}" for name in ("now", "then")]
        for cache in caches:
            cache.mkdir()
        now = ask(folders / variant, caches[0], None)
        then = ask(folders / variant, caches[1], packages)
        assert then[0] == version and then[0] != now[0]
        assert then[1:] == now[1:]


LORA = """
import sys, torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], r=4))
ids = torch.arange(12)[None]
optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
losses = []
for _ in range(3):
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
print(losses)
assert losses[2] < losses[1] < losses[0]
assert adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, 14)
"""


@pytest.mark.slow
def test_peft_trains_an_adapter(folders: Path, tmp_path: Path) -> None:
    packages = install(tmp_path, "peft", "accelerate")
    own = {"PYTHONPATH": str(packages), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LORA, str(folders / "h")]
    done = subprocess.run(command, env={**environment(), **own}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

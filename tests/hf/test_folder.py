"""An exported folder stands alone: transformers opens it in a process that has neither Megatron nor this package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_nvlm.data.collate import build_micro_batch
from megatron_nvlm.hf.exported_code import configuration_nvlm
from megatron_nvlm.hf.exported_files import exported_files
from megatron_nvlm.models.families.visions import VISION_FAMILIES
from megatron_nvlm.parallel.device import Device
from tests.hf.folders import PROMPTS, VARIANT_NAMES, config_of, pipeline_of, rows_of, write_folder
from tests.support.cacheless import generate
from tests.support.tiny import tiny_config, tiny_model

NEW_TOKENS = 4
HF_CODE = Path(configuration_nvlm.__file__).parent

# Runs in a folder of its own, without this repository on its path and without a network.
SCRIPT = """
import base64, io, json, socket, sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("megatron", "megatron_nvlm", "tests"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
def no_network(*_):
    raise OSError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = no_network
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
torch.set_num_threads(1)
job = json.load(sys.stdin)
for folder in job["folders"]:
    tensors = {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = [[Image.open(io.BytesIO(base64.b64decode(data))) for data in own] for own in job["images"]]
    inputs = processor(images, job["conversations"])
    with torch.no_grad():
        tensors["logits"] = model(**inputs).logits
    tensors["attention_mask"] = inputs["attention_mask"]
    answers = model.generate(**inputs, max_new_tokens=job["new_tokens"], do_sample=False)
    tensors["answers"] = answers[:, inputs["input_ids"].shape[1]:].contiguous()
    assert len(processor.decode_answers(inputs, answers)) == len(images)
    assert AutoTokenizer.from_pretrained(folder)("<|im_start|>").input_ids == [301]
    model.save_pretrained(folder + "_again")
    processor.save_pretrained(folder + "_again")
    again = AutoModel.from_pretrained(folder + "_again", trust_remote_code=True, dtype="auto").eval()
    inputs = AutoProcessor.from_pretrained(folder + "_again", trust_remote_code=True)(images, job["conversations"])
    with torch.no_grad():
        tensors["logits_again"] = again(**inputs).logits
    save_file(tensors, folder + "_results.safetensors")
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_nvlm")]
"""


@pytest.fixture(scope="module")
def results(world_of_one: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders d, x and h, and beside each what the other process made of it and saved again."""
    import base64

    root = tmp_path_factory.mktemp("folders")
    for variant in VARIANT_NAMES:
        config = tiny_config(variant)
        write_folder(root / variant, tiny_model(config, world_of_one), config)
    job = {
        "folders": [str(root / variant) for variant in VARIANT_NAMES],
        "conversations": [prompt.messages for prompt in PROMPTS.values()],
        "images": [[base64.b64encode(data).decode() for data in prompt.images] for prompt in PROMPTS.values()],
        "new_tokens": NEW_TOKENS,
    }
    (root / "cache").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "cache"), "HF_MODULES_CACHE": str(root / "cache" / "modules")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(job),
        cwd=root / "cache",
        env=environment,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_alone_it_answers_as_megatron_does(results: Path, world_of_one: Device, variant: str) -> None:
    found = load_file(results / f"{variant}_results.safetensors")
    model = tiny_model(tiny_config(variant), world_of_one).eval()
    pipeline = pipeline_of(variant)
    samples = [prompt.prepare(pipeline) for prompt in PROMPTS.values()]
    with torch.no_grad():
        expected = model(build_micro_batch(samples, pipeline))
    torch.testing.assert_close(rows_of(found["logits"], found["attention_mask"]), expected, rtol=0, atol=5e-5)
    stop = pipeline.tokenizer.special_id("<|im_end|>")
    answers = [answer[: answer.index(stop)] if stop in answer else answer for answer in found["answers"].tolist()]
    assert answers == generate(model, samples, pipeline, stop, NEW_TOKENS)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_saved_again_it_is_the_same(results: Path, variant: str) -> None:
    """Every weight bit for bit, every key of config.json, the code, and what the saved folder computes."""
    before, after = results / variant, results / f"{variant}_again"
    weights, again = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) and weights[name].dtype == again[name].dtype for name in weights)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    differing = {key for key in old if new.get(key) != old[key]}
    assert differing <= {"torch_dtype", "auto_map", "architectures"}  # where transformers names its class
    assert new.get("dtype", new.get("torch_dtype")) == "float64"
    assert new["auto_map"]["AutoModelForCausalLM"] == old["auto_map"]["AutoModelForCausalLM"]
    code = {path.name for path in before.glob("*.py")}
    assert code == exported_files("vision_nvlm.VisionModel").keys()
    for name in code:
        assert (after / name).read_text() == (before / name).read_text()
    found = load_file(results / f"{variant}_results.safetensors")
    assert torch.equal(found["logits"], found["logits_again"])


@pytest.mark.parametrize("vision_class", [family.exported_class for family in VISION_FAMILIES.values()])
def test_the_code_needs_no_more_than_it_says(vision_class: str) -> None:
    """Files import torch, numpy, Pillow, tokenizers, transformers and each other; nothing of them is left out."""
    exported = exported_files(vision_class)
    allowed = {"torch", "numpy", "PIL", "tokenizers", "transformers", *sys.stdlib_module_names}
    for name, text in exported.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), name
            elif isinstance(node, ast.ImportFrom):
                module = str(node.module)
                assert f"{module}.py" in exported if node.level else module.split(".")[0] in allowed, (name, module)
    families = {f"{family.exported_class.split('.')[0]}.py" for family in VISION_FAMILIES.values()}
    assert {path.name for path in HF_CODE.glob("*.py")} - {"__init__.py"} - families <= exported.keys()
    assert vision_class.split(".")[0] + ".py" in exported


@pytest.mark.parametrize("vision_class", [family.exported_class for family in VISION_FAMILIES.values()])
@pytest.mark.parametrize("name", ["configuration_nvlm", "modeling_nvlm", "image_processing_nvlm", "processing_nvlm"])
def test_files_that_are_opened_import_all_that_they_need(name: str, vision_class: str) -> None:
    """So that transformers 4, which copies from a local folder what the opened file imports, copies everything."""
    exported = exported_files(vision_class)

    def imported(stem: str) -> set[str]:
        nodes = ast.walk(ast.parse(exported[f"{stem}.py"]))
        return {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}

    assert all(imported(other) <= imported(name) for other in imported(name))
    assert name != "modeling_nvlm" or vision_class.split(".")[0] in imported(name)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no cross-attention": ({"cross_attention": None}, "cross_attention is missing"),
    "layers": ({"cross_attention.layers": [9]}, "cross_attention.layers is"),
    "missing key": ({"llm_config.rope_theta": None}, "config.json lacks llm_config.rope_theta"),
    "groups": ({"llm_config.num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
    "heads": ({"vision_config.num_attention_heads": 5}, "must be a multiple of num_attention_heads 5"),
    "norm": ({"vision_config.norm_type": "batch_norm"}, "it must be rms_norm or layer_norm"),
    "tile size": ({"force_image_size": 448}, "must equal vision_config.image_size"),
    "pixel shuffle": ({"ps_version": "v1"}, "ps_version v2"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_wrong_configuration_is_refused_with_a_sentence(name: str) -> None:
    changes, words = CHANGES[name]
    content = config_of(tiny_config("h"))
    for key, value in changes.items():
        *sections, last = key.split(".")
        part = content
        for section in sections:
            part = part[section]
        part[last] = value
    from megatron_nvlm.hf.exported_code.modeling_nvlm import NVLM_H_Model

    with pytest.raises(ValueError, match=words) as caught:
        NVLM_H_Model(configuration_nvlm.NVLM_H_Config(**content))
    assert "\n" not in str(caught.value)
    d_config = configuration_nvlm.NVLM_D_Config(**config_of(tiny_config("h")))
    with pytest.raises(ValueError, match="cross_attention is given and this is NVLM-D"):
        d_config.check()

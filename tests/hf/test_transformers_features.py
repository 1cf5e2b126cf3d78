"""What users of transformers do with any model works with an exported folder's, or is refused in a sentence."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from megatron_nvlm.hf.exported_code.modeling_nvlm import NVLM_D_Model, NVLM_H_Model, NVLM_X_Model, NVLMModel
from megatron_nvlm.hf.exported_code.processing_nvlm import NVLMProcessor
from tests.hf.folders import PROMPTS, VARIANT_NAMES, opened
from tests.hf.processors import load_processor
from tests.support.shards import picture

CLASSES: dict[str, type[NVLMModel]] = {"d": NVLM_D_Model, "x": NVLM_X_Model, "h": NVLM_H_Model}


def opened_folder(folders: Path, variant: str) -> tuple[NVLMModel, NVLMProcessor]:
    return CLASSES[variant].from_pretrained(folders / variant), load_processor(folders / variant)


def inputs_of(processor: NVLMProcessor) -> Any:
    prompt = PROMPTS["two images"]
    return processor([opened(prompt.images)], [prompt.messages])


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_gradient_checkpointing_changes_no_gradient(folders: Path, variant: str) -> None:
    model, processor = opened_folder(folders, variant)
    inputs, gradients = inputs_of(processor), []
    model.train()
    for checkpoints in (False, True):
        if checkpoints:
            # What the newest Trainer passes; older ones pass the first alone.
            newer = "kwargs" in inspect.signature(PreTrainedModel.gradient_checkpointing_enable).parameters
            own = {"every_n_layers": 1} if newer else {}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None, **own)
            assert model.language_model.model.gradient_checkpointing
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_more_tokens_are_saved_and_loaded(folders: Path, tmp_path: Path, variant: str) -> None:
    model, processor = opened_folder(folders, variant)
    inputs, rows = inputs_of(processor), model.config.llm_config.vocab_size
    with torch.no_grad():
        before = model.eval()(**inputs).logits
        model.resize_token_embeddings(rows + 8)
        after = model(**inputs).logits
        model.save_pretrained(tmp_path / "more")
        again = CLASSES[variant].from_pretrained(tmp_path / "more").eval()(**inputs).logits
    assert after.shape[-1] == rows + 8 and torch.equal(after[..., :rows], before)
    assert torch.equal(again, after)


def test_embeddings_stand_for_ids(folders: Path) -> None:
    """As PEFT passes them, by name, whether they are there or not."""
    model, _ = opened_folder(folders, "h")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, inputs_embeds=None, output_attentions=False).logits
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(found, expected)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 6, 4)}):
        with pytest.raises(ValueError, match="give the rows once"):
            model(**wrong)
    with pytest.raises(ValueError, match="NVLM gives no attention weights"):
        model(input_ids=ids, output_attentions=True)


def test_the_chat_pipeline_answers(folders: Path) -> None:
    model, processor = opened_folder(folders, "h")
    image = opened([picture(120, 90)])[0]
    asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (answer,) = pipe(text=asked, max_new_tokens=4, generate_kwargs={"do_sample": False})
    inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    expected = processor.decode_answers(inputs, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert answer["generated_text"][-1] == {"role": "assistant", "content": expected[0]}


def test_options_that_any_processor_is_given(folders: Path) -> None:
    _, processor = opened_folder(folders, "d")
    expected = processor(text=["Hi", "Hello there"], padding_side="right")
    grouped = {"text_kwargs": {"padding": True, "padding_side": "right"}, "images_kwargs": {}, "common_kwargs": None}
    found = processor(text=["Hi", "Hello there"], videos=None, audio=None, truncation=False, max_length=None, **grouped)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    refused: dict[str, dict[str, Any]] = {
        "truncation is True; a cut prompt": {"truncation": True},
        "NVLM takes images; give frames": {"videos": ["a.mp4"]},
        "prompts are as long as they are": {"text_kwargs": {"max_length": 5}},
        "has no option stride": {"stride": 3},
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words):
            processor(text="Hi", **options)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    assert processor.apply_chat_template(talk, continue_final_message=False)
    with pytest.raises(ValueError, match="cannot be continued"):
        processor.apply_chat_template(talk, continue_final_message=True)
    with pytest.raises(ValueError, match="is an address; download it"):
        processor("https://example.org/a.png", "<image>")


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_chat_as_on_the_release_card_is_the_processor_and_generate(folders: Path, variant: str) -> None:
    model, processor = opened_folder(folders, variant)
    tokenizer = AutoTokenizer.from_pretrained(folders / variant)
    one, two = picture(170, 110, seed=1), picture(50, 50, seed=2)
    tiles = processor.image_processor([one])["pixel_values"]
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert len(tiles) > 2

    def expected(turns: Any, images: list[bytes]) -> str:
        inputs = processor(images or None, turns)
        return processor.decode_answers(inputs, model.generate(**inputs, **asked))[0].strip()

    first, history = model.chat(tokenizer, tiles, "What is this?", asked, return_history=True)
    assert first == expected("<image>\nWhat is this?", [one]) and history == [("<image>\nWhat is this?", first)]
    turns = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And here? <image>"},
    ]
    both = torch.cat([tiles, processor.image_processor([two])["pixel_values"]])
    counts = [len(tiles), 1]
    again = model.chat(tokenizer, both, "And here? <image>", asked, history, num_patches_list=counts)
    assert again == expected([turns], [one, two])
    assert model.chat(tokenizer, None, "Hello", asked) == expected("Hello", [])
    with pytest.raises(ValueError, match="an image has 1, or its tiles and a thumbnail"):
        model.chat(tokenizer, tiles[:2], "What?", asked)
    with pytest.raises(ValueError, match="write one for each image"):
        model.chat(tokenizer, both, "What?", asked, num_patches_list=counts)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_prompt_lookup_changes_no_token(folders: Path, variant: str) -> None:
    """Its steps compute several rows after the prompt at once, the first of them beside the prompt's."""
    model, processor = opened_folder(folders, variant)
    inputs = inputs_of(processor)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_losses_of_micro_batches_sum_to_the_step_by_the_number_of_targets(folders: Path) -> None:
    model, processor = opened_folder(folders, "h")
    inputs = inputs_of(processor)
    with torch.no_grad():
        mean = model(**inputs, labels=inputs["input_ids"]).loss
        targets = inputs["input_ids"].shape[1] - 1
        for number in (4 * targets, torch.tensor(4 * targets)):
            share = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=number).loss
            assert torch.allclose(4 * share, mean, rtol=1e-6)

"""Llama-3's and Mistral's templates give the ids that transformers gives by the formats as their makers document them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.companions import chat_template, write_companions
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.conversation import TextPiece, Turn, encode_conversation, find_template
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.hf.folders import TOKENS_PER_TILE, config_of
from tests.hf.processors import load_processor
from tests.support.shards import picture
from tests.support.tiny import tiny_config

FORMATS = {
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
        "{% if message['role'] == 'user' %}"
        "{% if loop.last and said is defined %}{{ '[INST] ' + said + '\n\n' + message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
}
"""As Llama 3's and Mistral-7B-Instruct-v0.3's documentation spells conversations, without tools."""
SPECIALS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
}
ENDS = {"llama3": ("<|begin_of_text|>", "<|eot_id|>"), "mistral": ("<s>", "</s>")}
QUESTION = ("user", "What colour is it?\nOne word.")
TALKS: dict[str, tuple[tuple[str, str], ...]] = {
    "question": (QUESTION,),
    "system and question": (("system", "Be brief, please."), QUESTION),
    "answer": (QUESTION, ("assistant", "Red.")),
    "two turns": (QUESTION, ("assistant", "Red."), ("user", "And this?"), ("assistant", "Blue, I think.")),
    "space around": (("user", "What is it?"), ("assistant", "  A square.\n"), ("user", "Sure?")),
}


def byte_level(template: str) -> FastTokenizer:
    fast = qwen2_tokenizer(2000)
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[template]])
    return fast


def sentencepiece(template: str) -> FastTokenizer:
    """With spaces as Mistral's tokenizer.json has them."""
    fast = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    fast.train_from_iterator(
        [text for talk in TALKS.values() for _, text in talk] + ["systemuserassistant\n\n"], trainer
    )
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[template]])
    return fast


TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}


def theirs(fast: FastTokenizer, template: str, jinja: str) -> PreTrainedTokenizerFast:
    begin, end = ENDS[template]
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=begin, eos_token=end, chat_template=jinja)


def messages(talk: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in talk]


def pieces_of(talk: tuple[tuple[str, str], ...], fast: FastTokenizer, template: str) -> list[Any]:
    turns = [Turn(role, text) for role, text in talk]
    is_open = turns[-1].role == "user"
    num_images = sum(turn.num_images for turn in turns)
    return encode_conversation(turns, num_images, Tokenizer(fast), find_template(template), None, is_open)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("template", FORMATS)
def test_ids_equal_those_of_transformers(template: str, name: str, kind: str) -> None:
    if (template, kind) == ("llama3", "sentencepiece"):
        pytest.skip("Llama 3's tokenizer is one of bytes")
    fast, talk = TOKENIZERS[kind](template), TALKS[name]
    ids = [token for piece in pieces_of(talk, fast, template) for token in piece.ids]
    for jinja in (FORMATS[template], chat_template(find_template(template), None)):
        expected = theirs(fast, template, jinja).apply_chat_template(
            messages(talk), add_generation_prompt=talk[-1][0] == "user", tokenize=True, return_dict=False
        )
        assert ids == expected


@pytest.mark.parametrize(
    ("template", "learned"),
    [("llama3", "Red.<|eot_id|>Blue, I think.<|eot_id|>"), ("mistral", " Red.</s> Blue, I think.</s>")],
)
def test_answers_and_their_ends_are_learned(template: str, learned: str) -> None:
    fast = byte_level(template)
    pieces = pieces_of(TALKS["two turns"], fast, template)
    ids = [token for piece in pieces if piece.is_target for token in piece.ids]
    assert fast.decode(ids, skip_special_tokens=False) == learned


@pytest.mark.parametrize("template", FORMATS)
def test_images_stand_within_the_spelled_text(template: str) -> None:
    fast, jinja = byte_level(template), chat_template(find_template(template), "Be brief.")
    talk = (("user", "Look: <image> and <image>."), ("assistant", "Yes."))
    pieces = pieces_of((("system", "Be brief."), *talk), fast, template)
    texts = [
        fast.decode(piece.ids, skip_special_tokens=False) if isinstance(piece, TextPiece) else "<image>"
        for piece in pieces
    ]
    spelled = theirs(fast, template, jinja).apply_chat_template(messages(talk), tokenize=False)
    assert "".join(texts) == spelled.replace("<image>", "<Image><image></Image>")
    assert "Be brief." in spelled


def test_the_system_needs_a_users_turn_to_stand_in() -> None:
    fast = byte_level("mistral")
    for talk in (
        (("system", "S"), ("assistant", "A")),
        (QUESTION, ("assistant", "A"), ("system", "S"), QUESTION),
        (("system", "<image>"), QUESTION),
    ):
        with pytest.raises(UserError, match=r"system turn|says <image>"):
            pieces_of(talk, fast, "mistral")


@pytest.mark.parametrize("template", FORMATS)
def test_an_exported_folder_makes_the_same_tokens(tmp_path: Path, template: str) -> None:
    fast = byte_level(template)
    fast.save(str(tmp_path / "tokenizer.json"))
    config = config_of(tiny_config("d"))
    config["llm_config"]["vocab_size"] = 2050
    tiling = TilingConfig(tile_size=56, max_tiles=6)
    write_companions(tmp_path, config, tmp_path / "tokenizer.json", template, "Be brief.", tiling)
    processor = load_processor(tmp_path)
    pipeline = SamplePipeline(Tokenizer(fast), tiling, VARIANTS["d"], TOKENS_PER_TILE, 512, template, "Be brief.")
    asked = messages((("user", " <image>\nWhat is this? "), ("assistant", " A cat. "), ("user", "Sure?")))
    image = picture(130, 60)
    sample = pipeline.prepare(
        RawSample("asked", {"conversation": asked, "images": [{}]}, {"0.png": image}), open_answer=True
    )
    inputs = processor([image], asked)
    rows = sample.sequence
    is_text = rows.decoder_vision_index < 0
    assert inputs["input_ids"].shape == (1, len(rows.tokens))
    assert inputs["input_ids"][0].numpy()[is_text].tolist() == rows.tokens[is_text].tolist()
    assert inputs["vision_index"][0].tolist() == rows.decoder_vision_index.tolist()
    form = find_template(template)
    written = [*fast.encode(f"{form.roles['assistant'].lead}A dog.").ids, fast.token_to_id(form.turn_end)]
    outputs = inputs["input_ids"].new_tensor([inputs["input_ids"][0].tolist() + written])
    assert processor.decode_answers(inputs, outputs) == ["A dog."]
    if form.marks_turns:
        again = processor([image], processor.apply_chat_template(asked, add_generation_prompt=True))
        assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
    else:
        with pytest.raises(ValueError, match="does not mark turns"):
            processor.apply_chat_template(asked)


def test_stored_templates_of_before_are_read() -> None:
    """An exported folder of an earlier version has fewer fields."""
    form = find_template("chatml")
    content = form.content
    for speech in content["roles"].values():
        for name in ("label", "label_end", "lead", "strips"):
            del speech[name]
    assert dataclasses.asdict(type(form).of(content)) == form.content

"""A converted tokenizer.model gives the ids of SentencePiece's own library, on models trained here."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.text.sentencepiece_model import convert_sentencepiece
from megatron_nvlm.text.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="the extra dev has it")
TEXT = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("docs/*.md"))]
LLAMA: dict[str, Any] = dict(
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
)


def train(folder: Path, **options: Any) -> Path:
    """A tokenizer.model of 700 pieces."""
    folder.mkdir(exist_ok=True)
    lines = iter([line for text in TEXT for line in text.splitlines() if line.strip()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **{"vocab_size": 700, **LLAMA, **options},
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=["llama", "user symbols, no prefix"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    more: dict[str, Any] = {}
    if request.param != "llama":
        more = dict(user_defined_symbols=["<x>", "checkpoint"], add_dummy_prefix=False)
    file = train(tmp_path_factory.mktemp("model"), **more)
    return Tokenizer(convert_sentencepiece(file)), sentencepiece.SentencePieceProcessor(model_file=str(file))


@settings(max_examples=300)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from([" ", "  ", "the", "checkpoint", "<x>", "\n", "é", "火", "🔥", "ing", "."])).map("".join)
)
def test_ids_are_the_librarys(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    if "\0" in text or "\u2581" in text:  # SentencePiece's own sign for a space
        return
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def test_long_texts(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for text in TEXT:
        assert ours.encode(text) == theirs.encode(text)


def test_added_tokens_have_their_ids(tmp_path: Path) -> None:
    file = train(tmp_path / "model")
    described = {"added_tokens_decoder": {"700": {"content": "<|im_start|>", "special": True}}}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(described))
    assert Tokenizer(convert_sentencepiece(file)).special_id("<|im_start|>") == 700
    described["added_tokens_decoder"] = {"702": {"content": "<|im_end|>", "special": True}}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"'<\|im_end\|>' has id 702 and would get 700"):
        convert_sentencepiece(file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(model_type="unigram"), "is no byte-pair model"),
        (dict(normalization_rule_name="nmt_nfkc"), "normalizes text"),
        (dict(remove_extra_whitespaces=True), "removes spaces"),
        (dict(treat_whitespace_as_suffix=True), "puts spaces after words"),
    ],
)
def test_others_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        convert_sentencepiece(train(tmp_path / "model", **options))


@given(st.binary(max_size=60), st.integers(0, 2000))
def test_a_broken_file_is_one_sentence(tmp_path_factory: pytest.TempPathFactory, junk: bytes, cut: int) -> None:
    file = tmp_path_factory.mktemp("broken") / "tokenizer.model"
    file.write_bytes(junk[: cut or 1])
    with pytest.raises(UserError, match="is no tokenizer.model of SentencePiece"):
        convert_sentencepiece(file)

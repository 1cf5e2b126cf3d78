"""SentencePiece's tokenizer.model as a Hugging Face tokenizer, for folders of Llama, Yi and Mistral that have no other.

The file is a protocol buffer (ModelProto of sentencepiece_model.proto); what is read of it are pieces, scores and a few
settings. Byte-pair models without text normalization are converted. Others are refused, since their ids would differ.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

SENTENCEPIECE_FILE = "tokenizer.model"
"""Its name in folders."""
_SPACE = "\u2581"
"""What stands for a space in pieces."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BYTE_PAIR = 2
"""TrainerSpec.model_type of byte-pair encoding."""


@dataclass(frozen=True)
class Piece:
    """A token: its text, how early it is merged (higher is earlier), and its kind."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text."""

    pieces: tuple[Piece, ...]
    is_byte_pair: bool
    byte_fallback: bool
    """Whether characters without a piece become their bytes."""
    space_as_suffix: bool
    add_dummy_prefix: bool
    """Whether a space is put before every text."""
    remove_extra_spaces: bool
    has_normalization: bool


def convert_sentencepiece(file: Path) -> FastTokenizer:
    """The tokenizer of a tokenizer.model, with the tokens that the folder's other files add.

    Raises:
        UserError: no such file, or a model whose ids the conversion would change.
    """
    model = read_sentencepiece(file)
    for is_so, what in (
        (not model.is_byte_pair, "is no byte-pair model"),
        (model.has_normalization, "normalizes text"),
        (model.remove_extra_spaces, "removes spaces"),
        (model.space_as_suffix, "puts spaces after words"),
    ):
        if is_so:
            raise UserError(
                f"{file} {what}, which is not converted; make a tokenizer.json of it with transformers "
                "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
            )
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), None)
    fast = FastTokenizer(
        models.BPE(
            vocab=ids, merges=_merges(model, ids), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    if model.add_dummy_prefix:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    else:
        fast.normalizer = spaces
    stripped = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    for piece in model.pieces:
        if piece.kind in (_UNKNOWN, _CONTROL):
            fast.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
        elif piece.kind == _USER_DEFINED:
            fast.add_tokens([AddedToken(piece.text, special=False, normalized=False)])
    _add_tokens(fast, file.parent)
    return fast


def _merges(model: SentencePieceModel, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the highest scores first."""
    joins: list[tuple[float, int, int, tuple[str, str]]] = []
    normal = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    for piece in model.pieces:
        if piece.kind != _NORMAL:
            continue
        for at in range(1, len(piece.text)):
            left, right = piece.text[:at], piece.text[at:]
            if left in normal and right in normal:
                joins.append((-piece.score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(joins)]


def _add_tokens(fast: FastTokenizer, folder: Path) -> None:
    """Tokens of tokenizer_config.json and added_tokens.json, in the order of their ids."""
    added: dict[int, AddedToken] = {}
    for text, number in _read_json(folder / "added_tokens.json").items():
        added[int(number)] = AddedToken(text, special=True, normalized=False)
    for number, described in _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        text, special = described["content"], bool(described.get("special", False))
        added[int(number)] = AddedToken(text, special=special, normalized=False)
    for number, token in sorted(added.items()):
        (fast.add_special_tokens if token.special else fast.add_tokens)([token])
        if fast.token_to_id(token.content) != number:
            raise UserError(
                f"{folder}: the added token {token.content!r} has id {number} and would get "
                f"{fast.token_to_id(token.content)}; are tokenizer.model and tokenizer_config.json of one model?"
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or remove it if it adds no tokens") from error
    return found if isinstance(found, dict) else {}


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Read a tokenizer.model; UserError if it is none."""
    check_regular(file)
    try:
        fields = list(_fields(file.read_bytes()))
        pieces = tuple(_piece(data) for number, data in fields if number == 1)
        trainer = _settings(fields, 2)
        normalizer = _settings(fields, 3)
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file} is no tokenizer.model of SentencePiece ({error})") from error
    if not pieces or any(not piece.text for piece in pieces):
        raise UserError(f"{file} is no tokenizer.model of SentencePiece (it has no pieces)")
    # Defaults of sentencepiece_model.proto stand where a field is missing.
    return SentencePieceModel(
        pieces,
        is_byte_pair=trainer.get(3, 1) == _BYTE_PAIR,
        byte_fallback=bool(trainer.get(35, 0)),
        space_as_suffix=bool(trainer.get(24, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        has_normalization=bool(normalizer.get(2)) or not normalizer.get(5, 1),
    )


def _settings(fields: list[tuple[int, Any]], wanted: int) -> dict[int, Any]:
    return {number: value for owner, data in fields if owner == wanted for number, value in _fields(data)}


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    return Piece(fields.get(1, b"").decode(), fields.get(2, 0.0), fields.get(3, _NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: whole numbers, floats, and bytes."""
    at = 0
    value: Any
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("it ends too early")
        elif kind in (1, 5):
            form, length = ("<d", 8) if kind == 1 else ("<f", 4)
            (value,) = struct.unpack(form, data[at : at + length])
            at += length
        else:
            raise ValueError(f"a field of kind {kind}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends too early")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("a number without an end")

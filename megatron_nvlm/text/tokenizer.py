"""The few things we ask of a tokenizer, behind one class."""

import hashlib
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from megatron_nvlm.errors import UserError
from megatron_nvlm.regular_files import check_regular

_LONGEST_KEPT, _MOST_KEPT = 32, 4096
"""Ids of short texts are kept: tags, headers and wrappers come again in every sample."""


class Tokenizer:
    """A Hugging Face `tokenizer.json`. Text is only ever text: specials come from `special_id`, never from a string.

    Truncation, padding and dropout that the file stores are switched off: they would cut answers, teach padding and make
    the ids of a text random.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._fast.no_truncation()
        self._fast.no_padding()
        if getattr(self._fast.model, "dropout", None) is not None:
            self._fast.model.dropout = None
        # A user's text that spells "<|im_end|>" must not end a turn.
        self._fast.encode_special_tokens = True
        self._kept: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[FastTokenizer]]:
        """Through __init__, since the library's own pickling forgets what is set there."""
        return Tokenizer, (self._fast,)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json; UserError if it is missing or is none."""
        check_regular(path)
        if not Path(path).is_file():
            raise UserError(
                f"there is no tokenizer at {path}; set data.tokenizer to a tokenizer.json (transformers makes one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT))"
            )
        if Path(path).suffix == ".model":
            raise UserError(
                f"{path} is a SentencePiece model; make a tokenizer.json of it with nvlm-convert-checkpoint tokenizer "
                f"{path} --out tokenizer.json"
            )
        try:
            loaded = cls(FastTokenizer.from_file(str(path)))
            loaded.encode("A")
            return loaded
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and on some broken files it panics
            raise UserError(f"{path} is no tokenizer.json ({' '.join(str(error).split())[:300]})") from error

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; nothing is added.

        Raises:
            UserError: the text holds a lone surrogate.
        """
        if len(text) > _LONGEST_KEPT:
            return list(self._encode(text).ids)
        if text not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[text] = list(self._encode(text).ids)
        return list(self._kept[text])

    def _encode(self, text: str) -> Encoding:
        try:
            return self._fast.encode(text, add_special_tokens=False)
        except TypeError as error:  # what the library raises on text that has no UTF-8
            place = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if place is None:
                raise
            raise UserError(
                f"a text holds the lone surrogate U+{ord(text[place]):04X} at character {place}, which no UTF-8 text can "
                "hold; write that character again"
            ) from error

    def encode_joined(self, left: str, right: str) -> tuple[list[int], list[int]]:
        """Ids of `left + right` as one text, parted where `right` begins; a token that spans both is the left's."""
        encoded = self._encode(left + right)
        starts_left = sum(start < len(left) for start, _ in encoded.offsets)
        return encoded.ids[:starts_left], encoded.ids[starts_left:]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, specials left out."""
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """What one id stands for, to be looked at: specials by their names, bytes that are no text alone as `\ufffd`."""
        text: str = self._fast.decode([token], skip_special_tokens=False)
        return text

    def special_id(self, name: str) -> int:
        """Id of a special token; UserError if the tokenizer lacks it."""
        found = self._fast.token_to_id(name)
        if found is None:
            raise UserError(f"the tokenizer has no special token {name}, which data.template needs; choose another")
        return int(found)

    @property
    def vocab_size(self) -> int:
        """Ids in use, specials included; the model's embedding must have at least as many rows."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's definition."""
        return hashlib.sha256(self._fast.to_str().encode()).hexdigest()

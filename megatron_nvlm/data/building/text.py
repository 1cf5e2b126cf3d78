"""Text of inputs that is none: other encodings, halves of characters, names that are not UTF-8. Each is one sentence."""

import json
from typing import Any

from megatron_nvlm.errors import UserError

MOST_SHOWN, _BEGINNING = 200, 40
"""Characters of a path in a sentence; of a longer one so many from its beginning."""


def decode_text(data: bytes, what: str) -> str:
    """A text file, without the byte order mark that some editors write first.

    Args:
        what: of the sample, for the sentence.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); convert it, from Latin-1 for "
            "instance with iconv -f latin1 -t utf-8"
        ) from error


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object of whole characters; UserError if it is none."""
    content = load_json(data)
    if not isinstance(content, dict):
        raise UserError("its JSON is no object")
    return content


def load_json(data: bytes) -> Any:
    """Any JSON of whole characters.

    Raises:
        UserError: it is none, or a text in it cannot be written as UTF-8.
    """
    try:
        content = json.loads(data)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"its JSON holds half of a character ({half}, a lone surrogate); fix the text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"its JSON is broken: it is not UTF-8 ({error}); convert it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON is broken ({error})") from error
    return content


def check_name(name: str) -> None:
    """Refuse the name of a file or a sample that is not UTF-8 and could not be stored."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"its name {ascii(name)} is not UTF-8; rename it") from error


def printable(text: str) -> str:
    """The text with what cannot be written as UTF-8 spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(text: str) -> str:
    """A path or the like in quotes; of a long one, which may be a whole picture in base64, the beginning and the length."""
    if len(text) <= MOST_SHOWN:
        return repr(text)
    return f"{text[:_BEGINNING]!r}... ({len(text)} characters)"

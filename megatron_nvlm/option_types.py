"""Values of command lines, each kind refused by one sentence: types for `argparse`. Upper bounds are our choice."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_nvlm.errors import UserError


class LaunchedParser(argparse.ArgumentParser):
    """For entry points that a launcher starts on every rank: a mistake is one sentence, which the launcher repeats last."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage on every rank."""
        raise UserError(f"{message}; --help lists the options")


def positive_int(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def natural_int(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        value = _whole(text, least)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is over {most}")
        return value

    return parse


tile_pixels = whole_number(28, 4096)
"""Edge of a tile: at least one token, 2x2 patches of 14 pixels."""
tile_count = whole_number(1, 1024)
"""Most tiles of an image; an image chooses among all grids of at most this number."""
jpeg_quality = whole_number(1, 100)
network_port = whole_number(0, 65535)
batch_size = whole_number(1, 10**7)
token_count = whole_number(1, 10**8)
process_count = whole_number(1, 4096)
rank_count = whole_number(1, 10**7)


def utf8_text(text: str) -> str:
    """Text that can be written into shards and reports; bytes of another encoding come as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; type it in a UTF-8 terminal") from error
    return text


def named_folder(text: str) -> Path:
    """A folder whose own name goes into keys and reports, and must be UTF-8."""
    path = Path(text)
    if path.name in ("", ".."):  # the current folder, the one around it, the root
        path = path.resolve()
    utf8_text(path.name)
    return path


def local_path(text: str) -> Path:
    """A file or folder of this machine; a path would lose a slash of a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL, and only local files are read; fetch it first")
    return Path(text)


def positive_float(text: str) -> float:
    """A number over 0, neither infinite nor NaN."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
    return value


def megabytes(text: str) -> float:
    """A size over 0, of at most a million megabytes."""
    value = positive_float(text)
    if value > 1e6:
        raise argparse.ArgumentTypeError(f"{text} is over 1000000")
    return value


def natural_float(text: str) -> float:
    """A number from 0, neither infinite nor NaN."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is under 0")
    return value


def finite_float(text: str) -> float:
    """A number, neither infinite nor NaN."""
    return _number(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; it must be from 0 to 1")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is under {least}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value

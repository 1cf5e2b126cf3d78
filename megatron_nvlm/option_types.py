"""Numbers of command lines, each kind refused by one sentence: types for `argparse`."""

import argparse
import math
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


def positive_float(text: str) -> float:
    """A number over 0, neither infinite nor NaN."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
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

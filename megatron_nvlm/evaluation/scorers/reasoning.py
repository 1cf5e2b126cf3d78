"""Answers that end a chain of reasoning: GSM8K's number and MATH's boxed result. Definitions of our own, described here.

lm-evaluation-harness has filters of the same purpose; no number was compared with it.
"""

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
_FRACTION = re.compile(r"-?(?:\d+/\d+|\d*\.?\d+)")
_MOST_DIGITS = 100
_MARK = "####"
"""Stands before the result in GSM8K's own answers."""
_ANNOUNCED = re.compile(r"answer is:?\s*(.+)", re.IGNORECASE)
_DROPPED = (
    "\\left",
    "\\right",
    "\\!",
    "\\,",
    "\\;",
    "\\ ",
    "\\$",
    "$",
    "\\%",
    "%",
    "^\\circ",
    "^{\\circ}",
    "\\displaystyle",
)
_UNITS = re.compile(r"\\(?:text|mbox)\{\s*[^}]*\}$")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm)\{([^}]*)\}")


def gsm8k(answer: str, truth: str) -> float:
    """The number after `####`, or else the last number of the answer, equals the truth's."""
    return float(_result(truth) is not None and _result(answer) == _result(truth))


def gsm8k_strict(answer: str, truth: str) -> float:
    """As `gsm8k`, of answers that write `####` before their number; others are wrong."""
    return gsm8k(answer, truth) if _MARK in answer else 0.0


def _result(text: str) -> Fraction | None:
    _, _, marked = text.partition(_MARK)
    numbers = _NUMBER.findall(marked or text)
    found = numbers[0] if marked and numbers else numbers[-1] if numbers else None
    return None if found is None else _fraction(found.replace(",", ""))


def _fraction(text: str) -> Fraction | None:
    """A number of few digits, without an exponent: a model may write any number of them."""
    if len(text) > _MOST_DIGITS or not _FRACTION.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def math_boxed(answer: str, truth: str) -> float:
    """The last `\\boxed{}` (or what follows `answer is`) equals the truth's in a plain form of LaTeX, or as a number."""
    given, expected = plain_latex(_boxed(answer)), plain_latex(_boxed(truth))
    if not expected:
        return 0.0
    if given == expected:
        return 1.0
    number, target = _value(given), _value(expected)
    return float(number is not None and number == target)


def _boxed(text: str) -> str:
    """What stands in the last box; without one, what is announced, or the whole text."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        announced = _ANNOUNCED.findall(text)
        return announced[-1] if announced else text
    inside = start + text[start:].index("{") + 1
    depth = 1
    for place in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[inside:place]
    return text[inside:]


def plain_latex(text: str) -> str:
    """One spelling for what LaTeX can spell in several ways: sizes, spaces, units, short fractions."""
    text = text.strip().rstrip(".").strip()
    text = _UNITS.sub("", text) or text
    for word in _DROPPED:
        text = text.replace(word, "")
    text = _TEXT.sub(r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    return re.sub(r"\s+", "", text)


def _value(text: str) -> Fraction | None:
    """The number that a text is, as a fraction or a decimal."""
    found = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text)
    return _fraction(f"{found[1]}{found[2]}/{found[3]}" if found else text)

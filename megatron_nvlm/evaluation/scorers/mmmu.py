"""MMMU: which choice a free answer means, and whether an answer without choices holds the truth.

The release's scripts and lmms-eval both go back to MMMU's own evaluation and differ in what they take for a choice. Neither
counts an answer that names none as wrong: the release takes the first choice, the harness guesses. Here it is `None`, so
that the number of such answers can be told; `default` gives the release's.
"""

import re
from collections.abc import Iterable, Sequence

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_FEW_WORDS = 5
"""Up to this number of words, an answer is not searched for the text of a choice."""
_BEFORE_RESULT = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def letters_of(choices: Sequence[str]) -> list[str]:
    """A, B, C, ... for the choices."""
    return [chr(ord("A") + number) for number in range(len(choices))]


def release_choice(answer: str, choices: Sequence[str], default: str | None = None) -> str | None:
    """The letter that an answer means: `(B)` or `B)`, else `B` between spaces, else the text of a choice.

    Of several the last counts. What stands in \\answer{} or \\boxed{} counts alone.
    """
    boxed = re.search(r"\\answer\{(.*?)\}", answer) or re.search(r"\\boxed\{(.*?)\}", answer)
    text = _padded(boxed[1] if boxed else answer.replace("Answer:", "Answer: "))
    letters = letters_of(choices)
    found = [letter for letter in letters if f"{letter})" in text]
    if found:
        return _last(found, [text.rfind(f"({letter})") for letter in found])
    found = [letter for letter in letters if f" {letter} " in text]
    if found:
        return _last(found, [text.rfind(f" {letter} ") for letter in found])
    return _by_text(text, letters, choices) or default


def harness_choice(answer: str, choices: Sequence[str], default: str | None = None) -> str | None:
    """The letter that an answer means: `(B)`, else `B` before a space, else `B.`, else the text of a choice."""
    text = _padded(answer)
    letters = letters_of(choices)
    found = [letter for letter in letters if f"({letter})" in text]
    if found:
        return _last(found, [text.rfind(f"({letter})") for letter in found])
    for form in ("{} ", "{}."):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return _last(found, [text.rfind(f" {letter} ") for letter in found])
    return _by_text(text, letters, choices) or default


def _padded(text: str) -> str:
    for mark in _MARKS:
        text = text.strip(mark)
    return f" {text} "


def _by_text(text: str, letters: Sequence[str], choices: Sequence[str]) -> str | None:
    if len(text.split()) <= _FEW_WORDS:
        return None
    lowered = text.lower()
    places = {letter: lowered.rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    found = [letter for letter, place in places.items() if place >= 0]
    return _last(found, [places[letter] for letter in found]) if found else None


def _last(found: Sequence[str], places: Sequence[int]) -> str:
    """Of several letters the one that stands last; of equal places the first."""
    return found[max(range(len(found)), key=lambda number: (places[number], -number))]


def open_answer(answer: str, truths: str | Sequence[str]) -> float:
    """1 if a part of the answer that tells its result holds a truth: the words within it, or the number, to two decimals."""
    expected = {form for truth in ([truths] if isinstance(truths, str) else truths) for form in _forms(truth)}
    words = [form for form in expected if isinstance(form, str)]
    given = _given(answer)
    return float(
        any(form in expected if isinstance(form, float) else any(word in form for word in words) for form in given)
    )


def _given(answer: str) -> Iterable[str | float]:
    parts = _results(answer)
    numbers = [number for part in parts for number in _numbers(part)]
    return [form for part in (*parts, *numbers) for form in _forms(part)]


def _results(answer: str) -> list[str]:
    """Of each line what follows the last word that announces a result; of the last line, also what follows `=`."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines):
        announced = (*_BEFORE_RESULT, "=") if number == len(lines) - 1 else _BEFORE_RESULT
        # Of equally short ends the first; an empty one gives way to any that comes after it.
        end = ""
        for word in announced:
            if word in line:
                tail = line.rpartition(word)[2].strip()
                end = tail if not end or len(tail) < len(end) else end
        if end and end not in _MARKS:
            found.append(end)
    return found or [text]


def _numbers(text: str) -> list[str]:
    """Numbers with commas, in scientific notation, and plain ones."""
    return [
        *re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text),
        *re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text),
        *re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text),
    ]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or the words; a single letter counts beside a space only."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]

"""Scores, 0 to 1, of a short answer: ChartQA, VQAv2, TextVQA, DocVQA, OCRBench, AI2D, RealWorldQA, MathVista.

Where two definitions are in use, `release_*` is that of the scripts with which the paper's authors evaluate (Megatron-LM,
examples/multimodal/evaluation), and `harness_*` that of lmms-eval 0.7. They differ by points, so a number is named by its
scorer. The release brings every short answer and truth into VQA's form first, other than for OCRBench.
"""

import re
from collections.abc import Sequence

from megatron_nvlm.evaluation.scorers.normalise import evalai_form, vqa_form

RELAXED = 0.05
"""Share by which a number of ChartQA may be off."""
ANLS_THRESHOLD = 0.5
_ANNOTATORS = 3
"""Annotators of VQA that must agree for a full score."""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def release_chartqa(answer: str, truth: str) -> float:
    """Relaxed accuracy: `%` at the end is left out on both sides; numbers within 5 % of the truth, words exactly."""
    given, expected = vqa_form(answer).rstrip("%"), vqa_form(truth).rstrip("%")
    number, target = _number(given), _number(expected)
    if number is not None and target is not None:
        return float(target * (1 - RELAXED) <= number <= target * (1 + RELAXED))
    return float(given == expected)


def harness_chartqa(answer: str, truth: str) -> float:
    """Relaxed accuracy: `%` at the end divides by 100; numbers within 5 % of a truth that is not 0, words in any case."""
    number, target = _by_percent(answer), _by_percent(truth)
    if number is not None and target:
        return float(abs(number - target) / abs(target) <= RELAXED)
    return float(answer.lower() == truth.lower())


def _by_percent(text: str) -> float | None:
    if not text.endswith("%"):
        return _number(text)
    number = _number(text.rstrip("%"))
    return None if number is None else number / 100


def release_vqa(answer: str, truths: Sequence[str]) -> float:
    """VQAv2 and TextVQA: a third for each annotator who gave this answer, at most 1."""
    given = vqa_form(answer)
    return min(1.0, sum(vqa_form(truth) == given for truth in truths) / _ANNOTATORS)


def harness_vqav2(answer: str, truths: Sequence[str]) -> float:
    """VQAv2: the mean of that score over all ways to leave one annotator out."""
    return _leave_one_out([vqa_form(truth) == vqa_form(answer) for truth in truths])


def harness_textvqa(answer: str, truths: Sequence[str]) -> float:
    """TextVQA: the same, with answers in EvalAI's form."""
    return _leave_one_out([evalai_form(truth) == evalai_form(answer) for truth in truths])


def _leave_one_out(matches: Sequence[bool]) -> float:
    each = [min(1.0, (sum(matches) - match) / _ANNOTATORS) for match in matches]
    return sum(each) / len(each) if each else 0.0


def release_anls(answer: str, truths: Sequence[str]) -> float:
    """DocVQA: 1 - edits / longer length to the nearest truth, 0 from half the length on; in VQA's form."""
    given = _one_spaced(vqa_form(answer))
    return max((_similarity(given, _one_spaced(vqa_form(truth))) for truth in truths), default=0.0)


def _similarity(given: str, expected: str) -> float:
    length = max(len(given), len(expected))
    share = edit_distance(given, expected) / length if length else 0.0
    return 1 - share if share < ANLS_THRESHOLD else 0.0


def harness_anls(answer: str, truths: Sequence[str]) -> float:
    """DocVQA: as the release's without VQA's form; just half still counts, and lengths are those before spaces are cut."""
    given = _one_spaced(answer)
    shares = []
    for truth in truths:
        length = max(len(truth), len(answer))
        shares.append(edit_distance(given, _one_spaced(truth)) / length if length else 0.0)
    score = 1 - min(shares, default=1.0)
    return score if score >= ANLS_THRESHOLD else 0.0


def _one_spaced(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(diagonal + (left != right), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def release_ocrbench(answer: str, truths: Sequence[str], is_formula: bool = False) -> float:
    """OCRBench: how many truths stand within the answer, in any case; the sum over its 1,000 questions is the score.

    A question with several truths can so give more than 1.

    Args:
        is_formula: of the formulas of HME100k: spaces do not count, and case does.
    """
    return float(sum(_found_in(answer, truths, is_formula)))


def harness_ocrbench(answer: str, truths: Sequence[str], is_formula: bool = False) -> float:
    """OCRBench: whether a truth stands within the answer, with letters of full width (CJK) as plain ones but in formulas."""
    if not is_formula:
        answer, truths = _plain_width(answer), [_plain_width(truth) for truth in truths]
    return float(any(_found_in(answer, truths, is_formula)))


def _found_in(answer: str, truths: Sequence[str], is_formula: bool) -> list[bool]:
    if is_formula:
        return [_without_spaces(truth) in _without_spaces(answer) for truth in truths]
    return [_one_line(truth) in _one_line(answer) for truth in truths]


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _plain_width(text: str) -> str:
    return text.translate(_FULL_WIDTH)


def exact(answer: str, truth: str) -> float:
    """AI2D and RealWorldQA by the release: equal in VQA's form."""
    return float(vqa_form(answer) == vqa_form(truth))


def release_mathvista(answer: str, truth: str) -> float:
    """MathVista's questions without choices, by rule and without a judge: numbers cut (not rounded) to two decimals.

    Of words around a number only `answer is NUMBER` is understood.
    """
    return float(_number_in(_cut_decimals(vqa_form(answer))) == _cut_decimals(vqa_form(truth)))


def _cut_decimals(text: str) -> str:
    if re.fullmatch(r"\d+\.\d+", text):
        whole, decimals = text.split(".")
        text = whole if not decimals.strip("0") else f"{whole}.{decimals[:2]}"
    return text.replace("%", "").removesuffix(".")


def _number_in(text: str) -> str:
    found = re.search(r"answer is (-*\d+\.*\d*)", text)
    return found[1] if found and "e+" not in text else text

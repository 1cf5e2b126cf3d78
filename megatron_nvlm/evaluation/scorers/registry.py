"""The scorers by name, as task files ask for them: each takes an answer and its truth, and gives a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_nvlm.evaluation.scorers import mmmu, python_tests, reasoning, short_answers

FORMULAS = "HME100k"
"""The part of OCRBench that asks for formulas, by its field `dataset`."""


@dataclass(frozen=True)
class Truth:
    """What is known about a question's answer."""

    texts: tuple[str, ...]
    """Accepted answers, or those of all annotators; of a question with choices the letter."""
    choices: tuple[str, ...] = ()
    question: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further fields that the task names."""


Scorer = Callable[[str, Truth], float]
ChoiceRule = Callable[[str, Sequence[str], str | None], str | None]


def _of_one(rule: Callable[[str, str], float]) -> Scorer:
    """A rule for one truth; of several the best counts."""
    return lambda answer, truth: max((rule(answer, text) for text in truth.texts), default=0.0)


def _of_all(rule: Callable[[str, Sequence[str]], float]) -> Scorer:
    return lambda answer, truth: rule(answer, truth.texts)


def _ocrbench(rule: Callable[[str, Sequence[str], bool], float]) -> Scorer:
    return lambda answer, truth: rule(answer, truth.texts, truth.fields.get("dataset") == FORMULAS)


def _choice(rule: ChoiceRule, open_rule: Scorer, default: str | None) -> Scorer:
    """The letter where there are choices, else another rule.

    Args:
        default: the letter of an answer that names none.
    """

    def score(answer: str, truth: Truth) -> float:
        if not truth.choices:
            return open_rule(answer, truth)
        return float(rule(answer, truth.choices, default) in truth.texts)

    return score


def _python_tests(answer: str, truth: Truth) -> float:
    return python_tests.passes_tests(answer, truth.question, truth.fields["tests"], truth.fields["entry_point"])


_open_mmmu = _of_all(mmmu.open_answer)
_exact = _of_one(short_answers.exact)
SCORERS: dict[str, Scorer] = {
    "exact": _exact,
    "release_chartqa": _of_one(short_answers.release_chartqa),
    "harness_chartqa": _of_one(short_answers.harness_chartqa),
    "release_vqa": _of_all(short_answers.release_vqa),
    "harness_vqav2": _of_all(short_answers.harness_vqav2),
    "harness_textvqa": _of_all(short_answers.harness_textvqa),
    "release_anls": _of_all(short_answers.release_anls),
    "harness_anls": _of_all(short_answers.harness_anls),
    "release_ocrbench": _ocrbench(short_answers.release_ocrbench),
    "harness_ocrbench": _ocrbench(short_answers.harness_ocrbench),
    # Of an answer that names no choice the release takes the first; lmms-eval guesses, and here it is wrong.
    "release_mmmu": _choice(mmmu.release_choice, _open_mmmu, "A"),
    "harness_mmmu": _choice(mmmu.harness_choice, _open_mmmu, None),
    "release_mathvista": _choice(mmmu.release_choice, _of_one(short_answers.release_mathvista), "A"),
    "choice": _choice(mmmu.release_choice, _exact, None),
    "gsm8k": _of_one(reasoning.gsm8k),
    "gsm8k_strict": _of_one(reasoning.gsm8k_strict),
    "math_boxed": _of_one(reasoning.math_boxed),
    "python_tests": _python_tests,
}
"""Those of `release_*` and `harness_*` are described in docs/scorers.md."""
NEEDED_FIELDS: dict[str, tuple[str, ...]] = {"python_tests": ("tests", "entry_point")}
"""What a scorer reads of a truth's fields; one that is here needs no answers."""
RUN_CODE = ("python_tests",)
"""Scorers that run what the model wrote."""

"""The benchmarks' scorers: answers counted by hand, rules that hold for any answer, and lmms-eval's own functions.

The last need the package lmms-eval somewhere on the path; its sources are read, and nothing else of it is imported.
"""

import __future__

import ast
import importlib.util
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nvlm.evaluation.scorers import mmmu
from megatron_nvlm.evaluation.scorers.normalise import evalai_form, vqa_form
from megatron_nvlm.evaluation.scorers.short_answers import (
    edit_distance,
    exact,
    harness_anls,
    harness_chartqa,
    harness_ocrbench,
    harness_textvqa,
    harness_vqav2,
    release_anls,
    release_chartqa,
    release_mathvista,
    release_ocrbench,
    release_vqa,
)

WORDS = [
    *("the", "a", "An", "Two", "ten", "none", "12", "12%", "0.5", "1,000", "-3", "3.14", "42.", "1.50", "2.00", "e+5"),
    *("cat", "Cats", "isn't", "isnt", "dont", "yall", "dog's", "T-shirt", "A", "B", "(B)", "C.", "D)", "yes!", "no?"),
    *("answer", "is", "so", "=", "result", "final", "\n", "blue", "red/green", "９９", "Ａ", "Answer:", "[ok]", "x_y"),
]
answers = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join),
    st.text(alphabet="ab 0159.,%-()\n'", max_size=14),
)
truths = st.lists(answers, min_size=1, max_size=10)
choices = st.lists(st.sampled_from(["blue", "red", "the cat", "12", "no"]), min_size=2, max_size=5, unique=True)


@pytest.mark.parametrize(
    ("scorer", "answer", "truth", "score"),
    [
        (release_chartqa, "12%", "12", 1),
        (harness_chartqa, "12%", "12", 0),  # 0.12 beside 12
        (harness_chartqa, "12%", "0.12", 1),
        (release_chartqa, "104", "100", 1),
        (release_chartqa, "106", "100", 0),
        (harness_chartqa, "-3.1", "-3", 1),
        (harness_chartqa, "0.001", "0", 0),  # of a truth of 0, the text must be the same
        (harness_chartqa, "0", "0", 1),
        (release_chartqa, "The United States", "united states", 1),
        (harness_chartqa, "The United States", "united states", 0),
        (exact, "Two.", "2", 1),
        (exact, "A", "B", 0),
        (release_mathvista, "The answer is 3.149 cm", "3.14", 0),  # a number in words is not cut
        (release_mathvista, "3.149", "3.14", 1),
        (release_mathvista, "3.149", "3.15", 0),  # cut, not rounded
        (release_mathvista, "5.00", "5", 1),
        (release_mathvista, "answer is 7 cm", "7", 1),
        (release_mathvista, "12%", "12", 1),
        (release_mathvista, "", "12", 0),
    ],
)
def test_scores_of_one_truth(scorer: Any, answer: str, truth: str, score: float) -> None:
    assert scorer(answer, truth) == score


@pytest.mark.parametrize(
    ("text", "vqa", "evalai"),
    [
        ("The two cats.", "2 cats", "2 cats"),
        ("1,000", "1000", "1000"),
        ("3.5", "3.5", "3.5"),
        ("isnt it", "isn't it", "isn't it"),
        ("dog's", "dog's", "dog 's"),
        ("T-shirt", "t shirt", "t shirt"),
        ("yes, no", "yes no", "yes no"),
        ("red/green", "red green", "red green"),
        ("none", "0", "0"),
    ],
)
def test_normal_forms(text: str, vqa: str, evalai: str) -> None:
    assert (vqa_form(text), evalai_form(text)) == (vqa, evalai)


@given(st.integers(0, 10))
def test_votes_of_ten_annotators(votes: int) -> None:
    """Leaving one out: of those who agree one vote less counts."""
    given_truths = ["cat"] * votes + ["dog"] * (10 - votes)
    assert release_vqa("the cat", given_truths) == min(1, votes / 3)
    expected = (votes * min(1, (votes - 1) / 3) + (10 - votes) * min(1, votes / 3)) / 10
    assert harness_vqav2("the cat", given_truths) == pytest.approx(expected)
    assert harness_textvqa("the cat", given_truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "release", "harness"),
    [
        ("Invoice 12", "invoice 12", 1, 1),
        ("abcd", "abxx", 0, 0.5),  # half the length: the release's bound excludes it
        ("abcde", "abcxx", 0.6, 0.6),
        ("the abc", "abc", 1, 0),  # 4 of 7 characters
        ("", "", 1, 1),
        ("xyz", "abc", 0, 0),
    ],
)
def test_anls(answer: str, truth: str, release: float, harness: float) -> None:
    assert release_anls(answer, [truth]) == pytest.approx(release)
    assert harness_anls(answer, [truth, "something else"]) == pytest.approx(harness)


def distance_by_definition(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    replaced = distance_by_definition(one[1:], other[1:]) + (one[0] != other[0])
    return min(replaced, distance_by_definition(one[1:], other) + 1, distance_by_definition(one, other[1:]) + 1)


@given(st.text("ab", max_size=5), st.text("abc", max_size=5))
def test_edit_distance(one: str, other: str) -> None:
    assert edit_distance(one, other) == distance_by_definition(one, other)


def test_ocrbench_counts_truths_or_questions() -> None:
    assert release_ocrbench("Total: 12 EUR", ["12", "total"]) == 2
    assert harness_ocrbench("Total: 12 EUR", ["12", "total"]) == 1
    assert harness_ocrbench("Total", ["13"]) == release_ocrbench("Total", ["13"]) == 0
    assert (harness_ocrbench("９９", ["99"]), release_ocrbench("９９", ["99"])) == (1, 0)
    assert harness_ocrbench("x ^ {2}", ["x^{2}"], is_formula=True) == 1
    assert harness_ocrbench("X ^ {2}", ["x^{2}"], is_formula=True) == 0


@pytest.mark.parametrize(
    ("answer", "release", "harness"),
    [
        ("(B)", "B", "B"),
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("B) red", "B", None),  # only the release reads a single bracket
        ("First (A), then (B)", "B", "B"),
        ("I think that it is the cat, so there", "C", "C"),
        ("NASA says", None, "A"),  # the harness asks for no space before a letter
        ("\\boxed{B} and not (A)", "B", "A"),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_choices_of_mmmu(answer: str, release: str | None, harness: str | None) -> None:
    options = ["blue", "red", "the cat"]
    assert mmmu.release_choice(answer, options) == release
    assert mmmu.harness_choice(answer, options) == harness
    assert mmmu.release_choice(answer, options, default="A") == (release or "A")


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("The result is 1,234 m", "1234", 1),
        ("x = 3", "3", 1),
        ("x = 3\nso y is 4", "3", 0),  # `=` announces in the last line only
        ("x = 3\nno more", "3", 1),  # nothing is announced, so all counts
        ("so it could be Paris.", "paris", 1),
        ("3.14159", "3.14", 1),
        ("abc", ["x", "abc"], 1),
        ("ab", "a", 0),  # a single letter counts beside a space only
        ("", "1", 0),
    ],
)
def test_open_answers_of_mmmu(answer: str, truth: str | list[str], score: float) -> None:
    assert mmmu.open_answer(answer, truth) == score


@given(answers, truths, choices)
def test_every_score_lies_between_0_and_1_and_the_truth_itself_is_right(
    answer: str, expected: list[str], options: list[str]
) -> None:
    of_one = (release_chartqa, harness_chartqa, exact, release_mathvista)
    of_several = (release_vqa, harness_vqav2, harness_textvqa, release_anls, harness_anls, harness_ocrbench)
    assert all(0 <= scorer(answer, expected[0]) <= 1 for scorer in of_one)
    assert all(0 <= scorer(answer, expected) <= 1 for scorer in of_several)
    assert 0 <= release_ocrbench(answer, expected) <= len(expected)
    assert 0 <= mmmu.open_answer(answer, expected) <= 1
    assert all(scorer(answer, answer) == 1 for scorer in (exact, harness_chartqa))
    assert (
        release_anls(answer, [answer]) == harness_ocrbench(answer, [answer]) == release_vqa(answer, [answer] * 3) == 1
    )
    letters = {*mmmu.letters_of(options), None}
    assert {mmmu.release_choice(answer, options), mmmu.harness_choice(answer, options)} <= letters
    for letter in letters - {None}:
        assert mmmu.release_choice(f"({letter})", options) == mmmu.harness_choice(f"({letter})", options) == letter


def harness_sources() -> Path | None:
    spec = importlib.util.find_spec("lmms_eval")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def functions_of(name: str) -> dict[str, Any]:
    """Functions and classes of a file of lmms-eval, without what the file imports."""
    folder = harness_sources()
    if folder is None:
        pytest.skip("lmms-eval is not installed")
    tree = ast.parse((folder / name).read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in kept:
        node.decorator_list = []
    space: dict[str, Any] = {"re": re, "np": np, "random": NoGuess, "statistics": statistics}
    flags = __future__.annotations.compiler_flag  # types that are not imported stay names
    exec(compile(ast.Module(kept, []), name, "exec", flags), space)
    return space


class NoGuess:
    """Stands for `random`, so that the harness names no choice where it would guess."""

    @staticmethod
    def choice(choices: list[str]) -> None:
        return None


@settings(max_examples=300)
@given(answers, answers)
def same_chartqa(theirs: Any, answer: str, truth: str) -> None:
    assert harness_chartqa(answer, truth) == float(theirs["relaxed_correctness"](answer, truth))


@settings(max_examples=300)
@given(answers, truths)
def same_anls(theirs: Any, answer: str, expected: list[str]) -> None:
    assert harness_anls(answer, expected) == theirs["anls"](expected, [answer])["anls"]


@settings(max_examples=300)
@given(answers, truths, st.booleans())
def same_ocrbench(theirs: Any, answer: str, expected: list[str], is_formula: bool) -> None:
    doc = {"answer": expected, "dataset": "HME100k" if is_formula else "other", "question_type": ""}
    found = theirs["ocrbench_process_results"](doc, [answer])["ocrbench_accuracy"]["score"]
    assert harness_ocrbench(answer, expected, is_formula) == found


@settings(max_examples=300)
@given(answers, truths)
def same_textvqa(theirs: Any, answer: str, expected: list[str]) -> None:
    found = theirs["textvqa_process_results"]({"answers": [*expected], "question_id": 0}, [answer])["exact_match"]
    assert harness_textvqa(answer, expected) == pytest.approx(found)


@settings(max_examples=300)
@given(answers, truths)
def same_vqav2(theirs: Any, answer: str, expected: list[str]) -> None:
    listed = [{"answer": truth, "answer_id": number} for number, truth in enumerate(expected)]
    found = theirs["vqav2_process_results"]({"answers": listed, "question_id": 0}, [answer])["exact_match"]
    assert harness_vqav2(answer, expected) == pytest.approx(found)


@settings(max_examples=300)
@given(answers, choices)
def same_choices(theirs: Any, answer: str, options: list[str]) -> None:
    letters = mmmu.letters_of(options)
    by_letter = dict(zip(letters, options, strict=True))
    found = theirs["parse_mmmu_multi_choice_response"](answer, letters, by_letter)
    assert mmmu.harness_choice(answer, options) == found


@settings(max_examples=300)
@given(answers, answers)
def same_open_answers(theirs: Any, answer: str, truth: str) -> None:
    assert mmmu.open_answer(answer, truth) == float(theirs["eval_open"](truth, theirs["parse_open_response"](answer)))


@pytest.mark.parametrize(
    ("file", "compare"),
    [
        ("tasks/chartqa/utils.py", same_chartqa),
        ("api/metrics.py", same_anls),
        ("tasks/ocrbench/utils.py", same_ocrbench),
        ("tasks/textvqa/utils.py", same_textvqa),
        ("tasks/vqav2/utils.py", same_vqav2),
        ("tasks/_task_utils/mmmu_mcq_utils.py", same_choices),
        ("tasks/mmmu/utils.py", same_open_answers),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lmms_eval_gives_the_same_scores(file: str, compare: Any) -> None:
    theirs = functions_of(file)
    if file.startswith(("tasks/textvqa", "tasks/vqav2")):
        theirs["EvalAIAnswerProcessor"] = functions_of("tasks/_task_utils/vqa_eval_metric.py")["EvalAIAnswerProcessor"]
    compare(theirs)

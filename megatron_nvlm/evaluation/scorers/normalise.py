"""VQA's normal form of a short answer, by its two best-known definitions; they differ on a few forms.

`VQA` is the evaluation code of VQAv2, which the release's scripts use for every short answer: it leaves capitals and
contractions of unlisted words, and puts a space for punctuation between letters. `EVALAI` is the form of the TextVQA
challenge, which lmms-eval uses: lower case, and a possessive 's is a word of its own.
"""

import re
from collections.abc import Callable

NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

_NEGATED = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
# The spelling of VQA's list, where it does not follow from the rules below.
_IRREGULAR = {
    "im": "I'm",
    "ive": "I've",
    "maam": "ma'am",
    "oclock": "o'clock",
    "notve": "not've",
    "twas": "'twas",
    "yall": "y'all",
    "hes": "he's",
    "hows": "how's",
    "someones": "someone's",
    "somebodys": "somebody's",
    "thats": "that's",
    "theres": "there's",
    "whats": "what's",
    "wheres": "where's",
    "whos": "who's",
    "whys": "why's",
    "hed": "he'd",
    "someoned": "someone'd",
    "somethingd": "something'd",
    "thatd": "that'd",
    "whered": "where'd",
    "youd": "you'd",
    "itd": "it'd",
    "theyd": "they'd",
    "howd": "how'd",
    "whod": "who'd",
    "howll": "how'll",
    "itll": "it'll",
    "somebodyll": "somebody'll",
    "someonell": "someone'll",
    "somethingll": "something'll",
    "theyll": "they'll",
    "whatll": "what'll",
    "wholl": "who'll",
    "whyll": "why'll",
    "youll": "you'll",
    "therere": "there're",
    "theyre": "they're",
    "whatre": "what're",
    "whyre": "why're",
    "youre": "you're",
    "couldve": "could've",
    "mightve": "might've",
    "mustve": "must've",
    "shouldve": "should've",
    "wouldve": "would've",
    "theyve": "they've",
    "weve": "we've",
    "whatve": "what've",
    "whereve": "where've",
    "whove": "who've",
    "youve": "you've",
}
CONTRACTIONS = _IRREGULAR | {f"{verb}nt": f"{verb}n't" for verb in _NEGATED.split()}
"""Contractions written without an apostrophe, and with it. Doubled ones (couldn'tve) of VQA's list are left out: no answer
of its data has them."""


def vqa_form(text: str) -> str:
    """VQA's form."""
    return _words(_without_punctuation(text))


def evalai_form(text: str) -> str:
    """TextVQA's form."""
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_punctuation(re.sub(r"[\n\t]", " ", lowered).strip()))


FORMS: dict[str, Callable[[str], str]] = {"vqa": vqa_form, "evalai": evalai_form}


def _without_punctuation(text: str) -> str:
    """Each mark goes where it stands beside a space, or where the text has a comma within a number; else it is a space."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or has_number else " ")
    return _PERIOD.sub("", out)


def _words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, contractions with their apostrophe."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

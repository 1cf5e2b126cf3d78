"""Task files: what a benchmark asks, how its answers are scored, and where its data come from.

The package has one file for each benchmark of the paper; a task of a user's own is one file more, given by its path.
"""

import difflib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_nvlm.config.load import read_typed
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.scorers.registry import NEEDED_FIELDS, SCORERS
from megatron_nvlm.regular_files import check_regular

FOLDER = Path(__file__).parent
KINDS = ("vision-language", "text")
CHOICE_ANSWERS = ("letter", "index", "text")
PLACEHOLDERS = ("images", "question", "choices")
OWN_FIELDS = ("id", "question", "images", "choices", "answers")
"""What every task can read of a line, under these names unless `fields` says otherwise."""
SUITES: dict[str, tuple[str, ...]] = {
    "vision": ("mmmu", "mathvista", "vqav2", "ai2d", "textvqa", "chartqa", "docvqa", "realworldqa", "ocrbench"),
    "text": ("mmlu", "gsm8k", "math", "humaneval"),
}
SUITES["paper"] = (*SUITES["vision"], *SUITES["text"])


@dataclass(frozen=True)
class Task:
    """A task file: complete and flat."""

    name: str
    """Lower case letters, digits and `_`; its data are NAME.jsonl."""
    kind: str
    """`vision-language` or `text`."""
    prompt: str
    """The user's turn, with {images}, {question}, {choices} and names of `fields`. A line whose placeholders are all empty
    is left out."""
    scorers: list[str]
    """By their names in evaluation/scorers; the first is the one to compare with the paper's numbers."""
    split: str
    """Of the public data."""
    source: str
    """Where the public data come from, and what becomes of their columns."""
    prompt_without_choices: str | None = None
    """The same for questions without choices; `prompt` if null."""
    system: str | None = None
    """A system turn; null for the model's own."""
    image: str = "<image>"
    """How an image stands in {images}; {number} counts from 1."""
    choice: str = "{letter}. {text}"
    """A line of {choices}."""
    choice_answers: str = "letter"
    """How the data name the right choice: by `letter`, by `index` from 0, or by its `text`."""
    max_new_tokens: int = 32
    """Most tokens of an answer, which is generated greedily."""
    stop: list[str] = field(default_factory=list)
    """An answer ends before any of these."""
    few_shot: int = 0
    """Examples that are shown before each question, as earlier turns: the first of NAME.shots.jsonl."""
    shots_of: str | None = None
    """A name of `fields`: examples are the first that have the question's value there."""
    fields: dict[str, str] = field(default_factory=dict)
    """Name here: name in the lines of the data. Those of id, question, images, choices and answers need none if they are the
    same; further ones can stand in prompts."""
    scale: float = 100.0
    """A mean score of 1 is told as this."""
    note: str = ""
    """What a reader of the numbers must know."""

    def field_of(self, name: str) -> str:
        """The name that a field has in the data."""
        return self.fields.get(name, name)

    @property
    def further_fields(self) -> list[str]:
        """Names of `fields` beside those that every task has."""
        return [name for name in self.fields if name not in OWN_FIELDS]

    @property
    def data_file(self) -> str:
        """Name of the file of its data."""
        return f"{self.name}.jsonl"

    @property
    def shots_file(self) -> str:
        """Name of the file of its examples."""
        return f"{self.name}.shots.jsonl"

    @property
    def line_form(self) -> str:
        """What a line of its data holds, in words."""
        pictures = f', "{self.field_of("images")}": [paths]' if self.kind == "vision-language" else ""
        answers = [self.field_of(name) for scorer in self.scorers for name in NEEDED_FIELDS.get(scorer, ("answers",))]
        told = "".join(f', "{name}": ...' for name in dict.fromkeys(answers))
        return f'a JSON object a line, {{"{self.field_of("id")}", "{self.field_of("question")}"{pictures}{told}}}'


def read_task(path: Path) -> Task:
    """A task file.

    Raises:
        UserError: with the file, the key and how to correct it.
    """
    check_regular(path)
    task = read_typed(path, Task, "task file")
    _check(task, str(path))
    return task


def find_task(name: str) -> Task:
    """One of the package's tasks by name, or a file by its path (with a slash, or ending with .yaml).

    Raises:
        UserError: there is none.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        if not Path(name).exists():
            raise UserError(f"there is no task file {name}; correct --tasks")
        return read_task(Path(name))
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no task {name!r}; {hint} A file of your own is given by its path, ending with .yaml")
    return read_task(FOLDER / f"{name}.yaml")


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Several of them; UserError if two have one name, so that their files would be the same."""
    tasks = [find_task(name) for name in names]
    found: set[str] = set()
    for task in tasks:
        if task.name in found:
            raise UserError(f"two tasks are named {task.name}; give one another name")
        found.add(task.name)
    return tasks


def _check(task: Task, where: str) -> None:
    """Refuse values that no reader could use."""
    known = {*PLACEHOLDERS, *task.further_fields}
    for key, text, allowed in (
        ("prompt", task.prompt, known),
        ("prompt_without_choices", task.prompt_without_choices or "", known),
        ("image", task.image, {"number"}),
        ("choice", task.choice, {"letter", "text"}),
    ):
        unknown = sorted(placeholders(text, f"{where}: {key}") - allowed)
        if unknown:
            raise UserError(f"{where}: {key} has {{{unknown[0]}}}; known are {', '.join(sorted(allowed))}")
    named_fields = {*OWN_FIELDS, *task.further_fields}
    for key, value, is_right, rule in (
        ("name", task.name, bool(re.fullmatch(r"[a-z0-9_]+", task.name)), "lower case letters, digits and _"),
        ("kind", task.kind, task.kind in KINDS, f"one of {', '.join(KINDS)}"),
        ("choice_answers", task.choice_answers, task.choice_answers in CHOICE_ANSWERS, ", ".join(CHOICE_ANSWERS)),
        ("scorers", task.scorers, bool(task.scorers), "names of at least one scorer"),
        ("max_new_tokens", task.max_new_tokens, task.max_new_tokens >= 1, "at least 1"),
        ("few_shot", task.few_shot, task.few_shot >= 0, "at least 0"),
        ("scale", task.scale, task.scale > 0, "over 0"),
        ("stop", task.stop, all(task.stop), "texts that are not empty"),
        ("shots_of", task.shots_of, task.shots_of in (None, *named_fields), "a name of fields"),
        ("image", task.image, task.image.count("<image>") == 1, "text with one <image>"),
        ("prompt", task.prompt, "{question}" in task.prompt, "text with {question}"),
    ):
        if not is_right:
            raise UserError(f"{where}: {key} is {value!r}; it must be {rule}")
    for scorer in task.scorers:
        if scorer not in SCORERS:
            near = difflib.get_close_matches(scorer, SCORERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCORERS)}"
            raise UserError(f"{where}: there is no scorer {scorer!r}; {hint}")
        for name in NEEDED_FIELDS.get(scorer, ()):
            if name not in task.fields:
                raise UserError(
                    f"{where}: the scorer {scorer} needs {name}; say under fields which field of the data it is"
                )


def placeholders(text: str, what: str) -> set[str]:
    """Names in braces; UserError if the braces are not balanced, or hold more than a name."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{what} is no template ({error}); write {{{{ and }}}} for braces") from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not re.fullmatch(r"\w+", name)):
            raise UserError(f"{what} has {{{name}}}, which is no name; write {{{{ and }}}} for braces")
    return {name for _, name, _, _ in parts if name is not None}

"""The data of a task, one JSON object a line, as questions in the form of `generate --inputs` and as truths.

A question is {"id", "conversation", "images", "image_bytes"}: examples as earlier turns, images by absolute paths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.pictures import is_embedded
from megatron_nvlm.data.building.text import parse_json
from megatron_nvlm.errors import UserError
from megatron_nvlm.evaluation.scorers.mmmu import letters_of
from megatron_nvlm.evaluation.scorers.registry import NEEDED_FIELDS, Truth
from megatron_nvlm.evaluation.tasks.read import Task, placeholders
from megatron_nvlm.regular_files import read_whole

Question = dict[str, Any]


@dataclass(frozen=True)
class TaskSample:
    """A line of a task's data."""

    id: str
    question: str
    images: tuple[str, ...]
    truth: Truth

    @property
    def answer(self) -> str:
        """The answer that an example shows."""
        return self.truth.texts[0] if self.truth.texts else ""


def read_samples(task: Task, path: Path) -> list[TaskSample]:
    """All lines of a file but empty ones.

    Raises:
        UserError: with the file, the line and how to correct it.
    """
    samples: list[TaskSample] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_whole(path, f"the data {path} of task {task.name}").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = _read_sample(task, parse_json(line), number)
            if sample.id in line_of:
                raise UserError(f"its id {sample.id!r} is that of line {line_of[sample.id]} too")
        except UserError as error:
            raise UserError(f"line {number} of {path}: {error}") from error
        line_of[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path} holds no samples; each is {task.line_form}")
    return samples


def _read_sample(task: Task, content: Mapping[str, Any], number: int) -> TaskSample:
    values = {name: content.get(task.field_of(name)) for name in ("id", "question", "images", "choices", "answers")}
    told = values["id"]
    if isinstance(told, bool) or not isinstance(told, str | int | None):
        raise UserError(f"its {task.field_of('id')!r} is neither text nor a whole number")
    question = values["question"]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"its {task.field_of('question')!r} is empty or no text")
    choices = _texts(values["choices"], task.field_of("choices"))
    images = values["images"] or []
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise UserError(f"its {task.field_of('images')!r} is no list of paths")
    if task.kind == "vision-language" and not images:
        raise UserError(f"it has no {task.field_of('images')!r}, and the task {task.name} is about images")
    if task.kind == "text" and images:
        raise UserError(f"it has images, and the task {task.name} is about text; leave them out")
    further = {name: _text(content.get(task.fields[name]), task.fields[name]) for name in task.further_fields}
    answers = _texts(values["answers"], task.field_of("answers"))
    needs_answers = any(scorer not in NEEDED_FIELDS for scorer in task.scorers)
    if needs_answers and not answers:
        raise UserError(f"it has no {task.field_of('answers')!r}, so no answer can be scored")
    if choices:
        answers = tuple(_letter(task, answer, choices) for answer in answers)
    key = f"line {number}" if told is None else str(told)
    return TaskSample(key, question.strip(), tuple(images), Truth(answers, choices, question, further))


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"its {name!r} is neither text nor a number")
    return str(value)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """A text, a number, or a list of these or of VQA's `{"answer": ...}`."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_text(one.get("answer") if isinstance(one, Mapping) else one, name) for one in listed)


def _letter(task: Task, answer: str, choices: Sequence[str]) -> str:
    """The letter of a choice that the data name in another way."""
    letters = letters_of(choices)
    if task.choice_answers == "letter":
        known = dict(zip(letters, letters, strict=True))
    elif task.choice_answers == "index":
        known = {str(index): letter for index, letter in enumerate(letters)}
    else:
        known = dict(zip(choices, letters, strict=True))
    if answer.strip() not in known:
        raise UserError(f"its answer {answer!r} is no {task.choice_answers} of its {len(choices)} choices")
    return known[answer.strip()]


def make_questions(
    task: Task, samples: Sequence[TaskSample], shots: Sequence[TaskSample], folder: Path
) -> list[Question]:
    """What the model is asked about each sample.

    Args:
        shots: examples to choose from.
        folder: relative paths of images begin here.

    Raises:
        UserError: there are too few examples.
    """
    return [_make_question(task, sample, _choose_shots(task, sample, shots), folder) for sample in samples]


def _choose_shots(task: Task, sample: TaskSample, shots: Sequence[TaskSample]) -> Sequence[TaskSample]:
    if not task.few_shot:
        return ()
    name = task.shots_of
    own = [shot for shot in shots if name is None or shot.truth.fields.get(name) == sample.truth.fields.get(name)]
    if len(own) < task.few_shot:
        of = f" of {name} {sample.truth.fields.get(name)!r}" if name else ""
        raise UserError(
            f"{task.shots_file} has {len(own)} examples{of}, and the task {task.name} shows {task.few_shot}; add some, or "
            "copy the task file and set few_shot"
        )
    return own[: task.few_shot]


def _make_question(task: Task, sample: TaskSample, shots: Sequence[TaskSample], folder: Path) -> Question:
    turns = [] if task.system is None else [{"from": "system", "value": task.system}]
    for shot in shots:
        turns += [{"from": "human", "value": spell(task, shot)}, {"from": "gpt", "value": shot.answer}]
    turns.append({"from": "human", "value": spell(task, sample)})
    sources = [image for one in (*shots, sample) for image in one.images]
    paths = [None if is_embedded(source) else (folder / source).absolute() for source in sources]
    sizes = [path.stat().st_size if path is not None and path.is_file() else None for path in paths]
    images = [source if path is None else str(path) for source, path in zip(sources, paths, strict=True)]
    return {"id": sample.id, "conversation": turns, **({"images": images, "image_bytes": sizes} if images else {})}


def spell(task: Task, sample: TaskSample) -> str:
    """The user's turn: the prompt with what the sample has, without lines that have nothing to say."""
    template = (
        task.prompt if sample.truth.choices or task.prompt_without_choices is None else task.prompt_without_choices
    )
    choices = zip(letters_of(sample.truth.choices), sample.truth.choices, strict=True)
    values = {
        **sample.truth.fields,
        "question": sample.question,
        "images": " ".join(task.image.format(number=number) for number in range(1, len(sample.images) + 1)),
        "choices": "\n".join(task.choice.format(letter=letter, text=text) for letter, text in choices),
    }
    lines = []
    for line in template.split("\n"):
        names = placeholders(line, "the prompt")
        if not names or any(values[name] for name in names):
            lines.append(line.format(**values))
    return "\n".join(lines).strip()

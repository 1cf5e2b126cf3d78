"""Questions from a file of JSON lines, answers to another; a run that was interrupted goes on.

A line in: {"id", "question", "images": [paths]} or {"id", "conversation": [turns], "images": [paths]}, in the forms that
builds of shards read (data/building/forms.py). A line out: the same and "answer", or {"id", "error"} with one sentence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.forms import to_question
from megatron_nvlm.data.building.pictures import picture_place, present
from megatron_nvlm.data.building.text import parse_json
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.openai_request import open_batch_line
from megatron_nvlm.inference.questions import make_sample, read_image
from megatron_nvlm.regular_files import check_regular, read_whole
from megatron_nvlm.whole_files import write_whole


@dataclass(frozen=True)
class Request:
    """A line of the questions."""

    line: int
    """From 1."""
    id: str
    fields: dict[str, Any]
    turns: Sequence[dict[str, Any]] = ()
    images: Sequence[str | bytes] = ()
    """Its pictures, each a path or its content."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that it sets for itself."""
    error: str = ""
    """Why it is no question; empty if it is one."""


def read_requests(path: Path) -> list[Request]:
    """All lines but empty ones; what is wrong with a line is kept with it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = read_whole(path, f"the file of questions {path}").split(b"\n")
    except UserError as error:
        raise UserError(f"{error}; correct --inputs") from error
    found: list[Request] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _parse(number, line)
        if request.id in line_of:
            reason = f"its id {request.id!r} is that of line {line_of[request.id]} too"
            request = Request(number, f"line {number}", {}, error=reason)
        line_of[request.id] = number
        found.append(request)
    return found


def _parse(number: int, line: bytes) -> Request:
    name = f"line {number}"
    fields: dict[str, Any] = {}
    try:
        fields = present(parse_json(line))
        if "body" in fields and "id" not in fields and "custom_id" in fields:
            fields = {"id": fields["custom_id"], **fields}
        if not isinstance(fields.get("id", ""), str | int):
            fields = {}
            raise UserError("its 'id' is neither text nor a number")
        name = str(fields.get("id", name))
        question, settings = open_batch_line(fields)
        turns, images = to_question(question)
    except UserError as error:
        return Request(number, name, fields, error=str(error))
    return Request(number, name, fields, turns, images, settings)


def load_request(request: Request, folder: Path) -> RawSample:
    """The request with its pictures.

    Args:
        folder: relative paths of pictures begin here.

    Raises:
        UserError: it is no question, or a picture cannot be read.
    """
    if request.error:
        raise UserError(request.error)
    return make_sample(request.id, request.turns, [_read_picture(folder, source) for source in request.images])


def _read_picture(folder: Path, source: str | bytes) -> bytes:
    return source if isinstance(source, bytes) else read_image(folder / source, picture_place(folder, source))


def _parse_answer(line: bytes) -> dict[str, Any]:
    """A line of the answers; UserError if it is none."""
    fields = parse_json(line)
    if not isinstance(fields.get("id"), str | int):
        raise UserError("its 'id' is neither text nor a number")
    if not isinstance(fields.get("answer", fields.get("error")), str):
        raise UserError("it has neither an 'answer' nor an 'error' of text")
    return fields


class AnswerFile:
    """The answers of a run, appended as they come.

    Opening it takes out what is to be asked again: errors, and a last line that an interrupted run left half written.

    Raises:
        UserError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        """Ids with an answer."""
        check_regular(path)
        try:
            kept = self._read_kept()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, b"".join(kept))
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"the answers {path} cannot be written ({error.strerror}); correct --outputs") from error

    def _read_kept(self) -> list[bytes]:
        kept: list[bytes] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                fields = _parse_answer(line)
            except UserError as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break
                raise UserError(
                    f"line {number} of {self.path} is no answer: {error}; name another file with --outputs"
                ) from error
            if "answer" in fields and line.endswith(b"\n"):
                kept.append(line)
                self.done.add(str(fields["id"]))
        return kept

    def write(self, results: Sequence[tuple[Request, Mapping[str, Any], str]]) -> None:
        """Append (request, "answer" and what else is said of it, error) each; the error is empty if there is an answer."""
        for request, answered, error in results:
            told = {"id": request.fields.get("id", request.id)}
            line = {**told, "error": error} if error else {**told, **request.fields, **answered}
            self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

"""What answers the questions of a benchmark: a run directory by Megatron, or an exported folder by transformers."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_nvlm.checkpoint.integrity import IDENTITY_FILE, MANIFEST_FILE
from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answer_files import answer_file, named_error, open_questions
from megatron_nvlm.inference.request_files import AnswerFile, Request, load_request
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.models.families.config_file import read_config
from megatron_nvlm.runs.restore import open_trained_run


@dataclass(frozen=True)
class ModelFacts:
    """What a report says of a model."""

    name: str
    """Of its folder in the report, and of its column."""
    kind: str
    """`run` or `folder`."""
    path: str
    variant: str
    step: int | None
    """Of training; None for a folder, which does not tell."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What its answers depend on: the weights, and how they are asked. Not the layout."""

    @property
    def fingerprint(self) -> str:
        """Of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


class AskedModel(Protocol):
    """A model that is open."""

    facts: ModelFacts

    def answer(self, questions: Path, answers: Path, sampling: Sampling) -> int:
        """Answer the questions of a file that have no answer; returns how many could not be answered.

        Every rank calls it.
        """
        ...


class RunModel:
    """A run directory, under any layout; every rank opens it.

    Args:
        name: in the report; that of the run directory and the step if empty.

    Raises:
        UserError: there is no run or checkpoint, or the layout does not fit.
    """

    def __init__(
        self, run_dir: Path, checkpoint: Path | None, overrides: Sequence[str], batch_size: int, name: str = ""
    ) -> None:
        self._trained = open_trained_run(run_dir, checkpoint, overrides)
        self._batch_size = batch_size
        run, step = self._trained.run, self._trained.progress.step
        told = {
            name: (self._trained.checkpoint / name).read_text()
            for name in (IDENTITY_FILE, MANIFEST_FILE)
            if (self._trained.checkpoint / name).is_file()
        }
        asked = {"template": run.data.template, "system": run.data.system, "length": run.data.sequence_length}
        identity = {**told, **asked, "tiling": dataclasses.asdict(run.tiling)}
        name = name or f"{run_dir.resolve().name}_step_{step}"
        self.facts = ModelFacts(name, "run", str(run_dir.resolve()), run.model.variant, step, identity)

    def answer(self, questions: Path, answers: Path, sampling: Sampling) -> int:
        """Answer as `generate --inputs` does: replicas share the questions."""
        return answer_file(self._trained, questions, answers, self._batch_size, sampling)


class FolderModel:
    """An exported folder by transformers and the folder's own code, in one process.

    Args:
        name: in the report; that of the folder if empty.

    Raises:
        UserError: transformers is missing, or the folder is none that it can open.
    """

    def __init__(self, folder: Path, batch_size: int, name: str = "") -> None:
        self._batch_size = batch_size
        described = read_config(folder)
        self._model, self._processor = _open_folder(folder)
        name = name or folder.resolve().name
        variant = str(described.get("variant", "d"))
        self.facts = ModelFacts(name, "folder", str(folder.resolve()), variant, None, _folder_identity(folder))

    def answer(self, questions: Path, answers: Path, sampling: Sampling) -> int:
        """Answer greedily, a batch at a time."""
        file = AnswerFile(answers)
        requests, progress = open_questions(questions, file)
        failed = 0
        for start in range(0, len(requests), self._batch_size):
            some = requests[start : start + self._batch_size]
            found = self._answer_batch(some, questions.parent, sampling)
            file.write(
                [
                    (request, {"answer": text}, named_error(request, questions, error))
                    for request, (text, error) in zip(some, found, strict=True)
                ]
            )
            failed += sum(error != "" for _, error in found)
            progress.add(len(some))
        return failed

    def _answer_batch(self, requests: Sequence[Request], folder: Path, sampling: Sampling) -> list[tuple[str, str]]:
        """(answer, error) of each; a batch that the processor refuses is asked one by one, to name the one at fault."""
        try:
            raws = [load_request(request, folder) for request in requests]
            images = [[raw.pictures[f"{number}.image"] for number in range(len(raw.pictures))] for raw in raws]
            inputs = self._processor(text=[raw.record["conversation"] for raw in raws], images=images)
        except ValueError as error:  # UserError is one
            if len(requests) == 1:
                return [("", str(error))]
            return [self._answer_batch([request], folder, sampling)[0] for request in requests]
        device = next(self._model.parameters()).device
        output = self._model.generate(**inputs.to(device), max_new_tokens=sampling.max_new_tokens, do_sample=False)
        return [(cut_at(text, sampling.stop), "") for text in self._processor.decode_answers(inputs, output)]


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of several strings."""
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]


def _open_folder(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoProcessor, __version__
    except ImportError as error:
        raise UserError("an exported folder needs transformers; pip install 'transformers>=4.46,<6'") from error
    dtype = "torch_dtype" if __version__.startswith("4.") else "dtype"
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **{dtype: "auto"}).eval()
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(f"transformers cannot open {folder} ({str(error).splitlines()[0]}); export it again") from error
    if not hasattr(processor, "decode_answers"):
        raise UserError(f"{folder} has no processor of an export; name a folder that tools.convert_checkpoint exported")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu"), processor


def _folder_identity(folder: Path) -> dict[str, Any]:
    """Weights by size and time of their files, all else by its content."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = {path.name: list(_size_and_time(path)) for path in files if path.suffix == ".safetensors"}
    texts = (".json", ".py", ".jinja")
    described = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix in texts}
    return {**weights, **described}


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

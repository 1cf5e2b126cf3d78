"""A conversation on the terminal: the first rank reads and writes, all ranks compute."""

import queue
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.answer_files import from_first_rank
from megatron_nvlm.inference.answers import answer
from megatron_nvlm.inference.questions import Conversation, read_picture
from megatron_nvlm.inference.sampling import Sampling
from megatron_nvlm.runs.restore import TrainedRun

HELP = "Ask; /image FILE adds a picture to the next question, /new begins again, /quit (or end of input) ends."
STILL_HERE_SECONDS = 30
"""How often the other ranks are told that someone is still thinking, since no collective waits forever."""


class _Terminal:
    """Lines from the terminal, read beside the main thread, and what commands make of them."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.conversation = Conversation()
        self.images = list(images)
        self._lines: queue.Queue[str] = queue.Queue()
        self._shows_prompt = sys.stdin.isatty()
        print(HELP, flush=True)
        threading.Thread(target=self._read, daemon=True).start()
        self._prompt()

    def _read(self) -> None:
        for line in iter(sys.stdin.readline, ""):
            self._lines.put(line)
        self._lines.put("/quit")

    def _prompt(self) -> None:
        if self._shows_prompt:
            print("> ", end="", flush=True)

    def next_question(self) -> str | None:
        """A question; empty if there is none yet; None at the end."""
        try:
            line = self._lines.get(timeout=STILL_HERE_SECONDS).strip()
        except queue.Empty:
            return ""
        if line == "/quit":
            return None
        if line and not line.startswith("/"):
            return line
        try:
            self._command(line)
        except UserError as error:
            self.say(f"error: {error}")
        else:
            self._prompt()
        return ""

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/image" and argument:
            # A path may be dropped on the terminal, which quotes it.
            try:
                path = " ".join(shlex.split(argument))
            except ValueError:
                path = argument
            self.images.append(read_picture(Path(path).expanduser()))
            print(f"{len(self.images)} with the next question", flush=True)
        elif name == "/new":
            self.conversation, self.images = Conversation(), []
            print("begun again", flush=True)
        elif line:
            print(HELP, flush=True)

    def say(self, text: str) -> None:
        """An answer, and the next prompt."""
        print(text, flush=True)
        self._prompt()


def chat(trained: TrainedRun, images: Sequence[bytes], sampling: Sampling) -> None:
    """Until the end of input; every rank calls it.

    Args:
        images: of the first question.
    """
    terminal = _Terminal(images) if dist.get_rank() == 0 else None
    while True:
        question = from_first_rank(None if terminal is None else terminal.next_question())
        if question is None:
            return
        if not question:
            continue
        raw = from_first_rank(None if terminal is None else terminal.conversation.ask(question, terminal.images))
        assert raw is not None
        try:
            sample = trained.pipeline.prepare(raw, open_answer=True)
        except UserError as error:  # the same on every rank
            if terminal is not None:
                terminal.images = []
                terminal.say(f"error: {error}")
            continue
        text = answer(trained, [sample], sampling)[0]
        if terminal is not None:
            terminal.conversation.answered(text)
            terminal.images = []
            terminal.say(text)

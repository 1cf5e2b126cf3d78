"""What is written of answers, and how it goes on: greedily or drawn, one row of logits for each open sample.

A decoding lives on the last pipeline stage; the other stages learn of it what `Step` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_nvlm.inference.sampling import ChosenToken, TokenChooser
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """How the open rows go on; none when every answer is complete."""

    places: list[int]
    """For each row of the next pass, the row of the last one that it continues."""
    tokens: list[int]
    """The token that each row reads next."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer."""

    tokens: list[ChosenToken]
    """Without the end token; with those that a stop string stands in, so far as text before it does."""
    text: str
    is_complete: bool
    """Whether it ended by itself, at the end token or a stop string, and not at the most tokens."""

    @property
    def ids(self) -> list[int]:
        """Of its tokens."""
        return [token.id for token in self.tokens]


class Decoding(Protocol):
    """A way to write answers."""

    def advance(self, logits: Tensor) -> Step:
        """Take logits [rows, vocabulary] of the open rows; say which go on and how."""

    def answers(self) -> list[GeneratedAnswer]:
        """Of all samples, once no row is open."""


class TokenByToken:
    """Greedy or drawn answers."""

    def __init__(self, chooser: TokenChooser, tokenizer: Tokenizer) -> None:
        self.chooser, self.tokenizer = chooser, tokenizer
        self.open_samples = list(range(len(chooser.samplings)))
        self._written: list[list[ChosenToken]] = [[] for _ in self.open_samples]
        self._finished: dict[int, GeneratedAnswer] = {}

    def advance(self, logits: Tensor) -> Step:
        """As the protocol says."""
        step = Step([], [])
        chosen = self.chooser.choose(logits, self.open_samples)
        for place, (sample, token) in enumerate(zip(self.open_samples, chosen, strict=True)):
            if self._take(sample, token):
                step.places.append(place)
                step.tokens.append(token.id)
        self.open_samples = [self.open_samples[place] for place in step.places]
        return step

    def _take(self, sample: int, token: ChosenToken) -> bool:
        """Whether the sample goes on after this token."""
        sampling, written = self.chooser.samplings[sample], self._written[sample]
        if token.id == self.chooser.stop_id:
            self._finished[sample] = self._answer(written, is_complete=True)
            return False
        written.append(token)
        if sampling.stop and (cut := cut_at_stop(written, sampling.stop, self.tokenizer)) is not None:
            self._finished[sample] = cut
        elif len(written) == sampling.max_new_tokens:
            self._finished[sample] = self._answer(written, is_complete=False)
        return sample not in self._finished

    def _answer(self, written: list[ChosenToken], is_complete: bool) -> GeneratedAnswer:
        return GeneratedAnswer(written, self.tokenizer.decode([token.id for token in written]), is_complete)

    def answers(self) -> list[GeneratedAnswer]:
        """As the protocol says."""
        return [self._finished[sample] for sample in range(len(self._written))]


def cut_at_stop(written: list[ChosenToken], stop: Sequence[str], tokenizer: Tokenizer) -> GeneratedAnswer | None:
    """The answer before its first stop string; None if it holds none. A stop string may begin and end within tokens."""
    ids = [token.id for token in written]
    text = tokenizer.decode(ids)
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    if not places:
        return None
    text = text[: min(places)]
    count = 0
    while not tokenizer.decode(ids[:count]).startswith(text):
        count += 1
    return GeneratedAnswer(written[:count], text, is_complete=True)


def token_logprobs(found: GeneratedAnswer, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Log-probabilities of an answer's tokens, as OpenAI's `logprobs.content` has them, with the tokens' ids."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": tokenizer.token_text(token), "id": token, "logprob": logprob}

    return [
        {**told(token.id, token.logprob), "top_logprobs": [told(*other) for other in token.alternatives]}
        for token in found.tokens
    ]

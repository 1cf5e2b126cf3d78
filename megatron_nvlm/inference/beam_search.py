"""Beam search, step for step as transformers has it (`GenerationMixin._beam_search`), so that the answers are the same.

Each sample has `beams` rows. A step ranks all continuations of a sample's rows by the sum of their log-probabilities. Those
that end are kept as complete answers, ranked by sum / length ** length_penalty; the best that do not end are the rows of the
next step. The end token counts towards the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_nvlm.inference.decoding import GeneratedAnswer, Step, cut_at_stop
from megatron_nvlm.inference.sampling import ChosenToken, Sampling, change_scores
from megatron_nvlm.text.tokenizer import Tokenizer

_NEVER = -1e9
"""Score of what is not there, as in transformers."""


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...] = ()
    score: float = 0.0
    """Sum of log-probabilities; of a complete answer, over its length to the power of the penalty."""
    place: int = 0
    """Its row in the step before, among those of its sample."""


class _Search:
    """The beams of one sample."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], stop_id: int, tokenizer: Tokenizer) -> None:
        self.sampling, self.prompt, self.stop_id, self.tokenizer = sampling, prompt, stop_id, tokenizer
        self.running = [_Beam()]
        self.complete: list[_Beam] = []
        """At most `beams`, the best first."""
        self.is_open = True

    def advance(self, logits: Tensor) -> None:
        """Take logits [running beams, vocabulary]."""
        most, length = self.sampling.beams, len(self.running[0].ids) + 1
        candidates = self._best_continuations(logits, 2 * most)
        ends = [self._ends(beam) for beam in candidates]
        # A candidate that ends counts only if it is among the best, the others are there so that enough go on.
        finished = [beam for beam, is_end in zip(candidates[:most], ends, strict=False) if is_end]
        if not (self.sampling.early_stopping and len(self.complete) == most):
            power: float = length**self.sampling.length_penalty
            ranked = self.complete + [replace(beam, score=beam.score / power) for beam in finished]
            self.complete = sorted(ranked, key=lambda beam: -beam.score)[:most]
        self.running = [beam for beam, is_end in zip(candidates, ends, strict=True) if not is_end][:most]
        self.is_open = bool(self.running) and self._can_improve(length)

    def _best_continuations(self, logits: Tensor, count: int) -> list[_Beam]:
        rows = []
        for row, beam in zip(logits, self.running, strict=True):
            seen = (*self.prompt, *beam.ids)
            scores = change_scores(row.double().log_softmax(-1), self.sampling, seen, len(beam.ids), self.stop_id)
            rows.append(scores + beam.score)
        scores = torch.stack(rows)  # [running beams, vocabulary]
        values, numbers = scores.flatten().topk(min(count, scores.numel()))
        vocabulary = scores.shape[-1]
        return [
            _Beam((*self.running[number // vocabulary].ids, number % vocabulary), value, number // vocabulary)
            for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
            if value > _NEVER
        ]

    def _ends(self, beam: _Beam) -> bool:
        is_last = beam.ids[-1] == self.stop_id or len(beam.ids) == self.sampling.max_new_tokens
        return is_last or self._cut(beam.ids) is not None

    def _cut(self, ids: Sequence[int]) -> GeneratedAnswer | None:
        if not self.sampling.stop:
            return None
        return cut_at_stop([ChosenToken(token) for token in ids], self.sampling.stop, self.tokenizer)

    def _can_improve(self, length: int) -> bool:
        if len(self.complete) < self.sampling.beams:
            return True
        if self.sampling.early_stopping:
            return False
        return self.running[0].score / length**self.sampling.length_penalty > self.complete[-1].score

    def answer(self) -> GeneratedAnswer:
        """The best complete answer."""
        ids = self.complete[0].ids
        has_end = ids[-1] == self.stop_id
        ids = ids[:-1] if has_end else ids
        cut = self._cut(ids)
        if cut is not None:
            return cut
        return GeneratedAnswer([ChosenToken(token) for token in ids], self.tokenizer.decode(list(ids)), has_end)


class BeamSearch:
    """Beam search of several samples.

    Args:
        prompts: text ids of each sample's prompt.
        stop_id: token that ends an answer.
    """

    def __init__(
        self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], stop_id: int, tokenizer: Tokenizer
    ) -> None:
        self._searches = [
            _Search(sampling, prompt, stop_id, tokenizer) for sampling, prompt in zip(samplings, prompts, strict=True)
        ]

    def advance(self, logits: Tensor) -> Step:
        """As the protocol of decodings says."""
        step = Step([], [])
        start = 0
        for search in (search for search in self._searches if search.is_open):
            rows = len(search.running)
            search.advance(logits[start : start + rows])
            if search.is_open:
                step.places.extend(start + beam.place for beam in search.running)
                step.tokens.extend(beam.ids[-1] for beam in search.running)
            start += rows
        return step

    def answers(self) -> list[GeneratedAnswer]:
        """As the protocol of decodings says."""
        return [search.answer() for search in self._searches]

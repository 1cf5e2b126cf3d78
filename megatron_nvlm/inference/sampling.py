"""How an answer is generated: settings, what changes the logits before a choice, and the choice of one token.

The changes are those of transformers' logits processors, in transformers' order: repetition penalty, least length,
temperature, top-k, top-p.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.sharding import gather_parts

MOST_LOGPROBS = 20
"""Alternatives told for each token; OpenAI's limit."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated; as it stands, greedily."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities add up to this."""
    seed: int = 0
    max_new_tokens: int = 64
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 from all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer already hold are divided by it if positive, else multiplied; 1 for none."""
    min_new_tokens: int = 0
    """The end token is not chosen before the answer has this many tokens."""
    stop: tuple[str, ...] = ()
    """An answer ends where its text holds one of these, and is cut before it."""
    logprobs: int | None = None
    """Alternatives told with the log-probability of each token; None tells no log-probabilities."""
    beams: int = 1
    """Answers followed at once in beam search; 1 for none."""
    length_penalty: float = 1.0
    """Beam search divides the score of an answer by its length to this power."""
    early_stopping: bool = False
    """Whether beam search ends once `beams` answers are complete, or only when none can get better."""

    def __post_init__(self) -> None:
        for name, is_right, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 takes the likeliest token)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 draws from all tokens)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}"),
            ("beams", self.beams >= 1, "at least 1"),
            ("length_penalty", abs(self.length_penalty) < math.inf, "a finite number"),
        ):
            if not is_right:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {rule}")
        drawn = (self.temperature > 0, self.top_k > 0, self.top_p < 1, self.logprobs is not None)
        if self.beams > 1 and any(drawn):
            raise UserError(
                "beams draw nothing and tell no log-probabilities; leave out either beams or temperature, top_k, top_p and "
                "logprobs"
            )
        if self.beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            raise UserError(
                "length_penalty and early_stopping belong to beam search; give beams too, or leave them out"
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class ChosenToken:
    """A token of an answer, and how likely the model found it before any setting changed its logits."""

    id: int
    logprob: float | None = None
    """None unless `Sampling.logprobs` asks for it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest tokens, the likeliest first."""


class TokenChooser:
    """Chooses for several samples; what one gets depends on its own logits, tokens, key and settings alone.

    Args:
        samplings: of each sample.
        keys: names of the samples.
        prompts: text ids of each sample's prompt.
        stop_id: token that ends an answer.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        keys: Sequence[str],
        prompts: Sequence[Sequence[int]] | None = None,
        stop_id: int = -1,
    ) -> None:
        self.samplings = samplings
        self.stop_id = stop_id
        self._prompts = prompts or [[] for _ in keys]
        self._written: list[list[int]] = [[] for _ in keys]
        self._generators = [
            torch.Generator().manual_seed(_seed_of(sampling.seed, key))
            for sampling, key in zip(samplings, keys, strict=True)
        ]

    def choose(self, logits: Tensor, samples: Sequence[int]) -> list[ChosenToken]:
        """[o, vocabulary] -> tokens of these samples, by their numbers; of equally likely tokens the lowest if greedy."""
        chosen = [self._choose(row, sample) for row, sample in zip(logits, samples, strict=True)]
        ids = torch.stack(chosen).tolist() if chosen else []
        for token, sample in zip(ids, samples, strict=True):
            self._written[sample].append(token)
        return [
            describe(row, token, self.samplings[sample].logprobs)
            for row, token, sample in zip(logits, ids, samples, strict=True)
        ]

    def _choose(self, logits: Tensor, sample: int) -> Tensor:
        """[vocabulary] -> id, a tensor of no dimension."""
        sampling, written = self.samplings[sample], self._written[sample]
        if sampling.repetition_penalty != 1 or len(written) < sampling.min_new_tokens:
            seen = (*self._prompts[sample], *written)
            logits = change_scores(logits, sampling, seen, len(written), self.stop_id)
        if sampling.temperature == 0:
            return logits.argmax(-1)
        number = float(torch.rand((), generator=self._generators[sample], dtype=torch.float64))
        uniform = torch.tensor([number], dtype=torch.float64, device=logits.device)
        return draw(logits[None], sampling, uniform)[0]


def change_scores(scores: Tensor, sampling: Sampling, seen: Sequence[int], num_written: int, stop_id: int) -> Tensor:
    """Repetition penalty and least length, on logits or log-probabilities [vocabulary] of one sample.

    Args:
        seen: ids that prompt and answer hold so far.
        num_written: tokens of the answer so far.
    """
    scores = scores.double()
    if sampling.repetition_penalty != 1 and seen:
        ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=scores.device)
        found = scores[ids]
        penalty = sampling.repetition_penalty
        scores = scores.scatter(0, ids, torch.where(found < 0, found * penalty, found / penalty))
    if num_written < sampling.min_new_tokens and stop_id >= 0:
        scores = scores.scatter(0, torch.tensor([stop_id], device=scores.device), float("-inf"))
    return scores


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Tokens from logits [o, vocabulary] and numbers [o] between 0 and 1, at a temperature above 0.

    Tokens stand in the order of their probability; the one under the number, in the stretch that top-k and top-p leave, is
    taken. Tokens as likely as the last that top-k leaves are left too.
    """
    wide = logits.double()
    if 0 < sampling.top_k < wide.shape[-1]:
        wide = wide.masked_fill(wide < wide.topk(sampling.top_k).values[:, -1:], float("-inf"))
    likely, order = (
        ((wide - wide.amax(-1, keepdim=True)) / sampling.temperature)
        .softmax(-1)
        .sort(dim=-1, descending=True, stable=True)
    )
    up_to = likely.cumsum(-1)
    allowed = likely * (up_to - likely < sampling.top_p)  # those before it have not reached top-p; always the first
    ends = allowed.cumsum(-1)
    place = torch.searchsorted(ends, (uniform * ends[:, -1])[:, None], right=True)
    most = (allowed > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, place.minimum(most))[:, 0]


def describe(logits: Tensor, token: int, alternatives: int | None) -> ChosenToken:
    """The token with its log-probability under unchanged logits [vocabulary], as far as they are asked for."""
    if alternatives is None:
        return ChosenToken(token)
    logprobs = logits.double().log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return ChosenToken(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, vocabulary / TP] -> [tokens, vocabulary] on every rank of the group."""
    return torch.cat(gather_parts(logits, group), dim=-1)


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1

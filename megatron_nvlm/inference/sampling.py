"""Which token comes next: the likeliest, or one drawn by temperature and top-p, each sample with a generator of its own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.sharding import gather_parts


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; as it stands, greedily."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities add up to this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")


GREEDY = Sampling()


class TokenChooser:
    """Chooses for several samples; what one gets depends on its own logits, its key and the seed alone.

    Args:
        keys: names of the samples.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[str]) -> None:
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(_seed_of(sampling.seed, key)) for key in keys]

    def choose(self, logits: Tensor, samples: Sequence[int]) -> list[int]:
        """[o, vocabulary] -> ids for these samples, by their numbers; of equally likely tokens the lowest if greedy."""
        if self.sampling.temperature == 0:
            return [int(token) for token in logits.argmax(-1)]
        uniform = torch.tensor(
            [float(torch.rand((), generator=self._generators[sample], dtype=torch.float64)) for sample in samples],
            dtype=torch.float64,
            device=logits.device,
        )
        return [int(token) for token in draw(logits, self.sampling, uniform)]


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Tokens from logits [o, vocabulary] and numbers [o] between 0 and 1, at a temperature above 0.

    Tokens stand in the order of their probability; the one under the number, in the stretch that top-p leaves, is taken.
    """
    wide = logits.double()
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


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, vocabulary / TP] -> [tokens, vocabulary] on every rank of the group."""
    return torch.cat(gather_parts(logits, group), dim=-1)


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1

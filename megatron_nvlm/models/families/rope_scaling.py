"""Scaled rotary embeddings: how a language model that was trained on short texts turns the positions of longer ones.

This file needs torch alone: exported Hugging Face folders carry a copy of it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LLAMA3 = "llama3"
YARN = "yarn"
_KEYS: dict[str, tuple[str, ...]] = {
    LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    YARN: ("factor", "original_max_position_embeddings"),
}
"""What the settings of each kind must say."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**40


@dataclass(frozen=True)
class RopeScaling:
    """Settings of a scaled rotary embedding, by the names of Hugging Face's config.json."""

    rope_type: str
    """llama3 or yarn."""
    factor: float
    """How much longer texts become."""
    original_max_position_embeddings: int
    """Tokens of the texts that the model was trained on first."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What cosine and sine are multiplied by (YaRN); None for the paper's 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the ends of YaRN's ramp are whole numbers."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], max_position_embeddings: int | None) -> "RopeScaling":
        """Of the settings in a config.json.

        Raises:
            ValueError: another kind of scaling, or a key that is missing or not understood; half a sentence.
        """
        kind = str(settings.get("rope_type") or settings.get("type"))
        given = {name: value for name, value in settings.items() if value is not None}
        if kind not in _KEYS:
            raise ValueError(f"scales its rotary embedding by {kind!r}, which is neither llama3 nor yarn")
        if kind == YARN and max_position_embeddings:
            given.setdefault("original_max_position_embeddings", max_position_embeddings)
        missing = [key for key in _KEYS[kind] if key not in given]
        if missing:
            raise ValueError(f"scales its rotary embedding by {kind} without {', '.join(missing)}")
        if kind == YARN and given.get("attention_factor") is None and given.get("mscale_all_dim"):
            raise ValueError("scales its rotary embedding by yarn with mscale_all_dim, which no supported family has")
        for name in cls.__dataclass_fields__:
            value = given.get(name)
            if name not in ("rope_type", "truncate") and not (value is None or _is_number(value)):
                raise ValueError(f"scales its rotary embedding with the {name} {value!r}, which is no number over 0")
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        return cls(**{**known, "rope_type": kind})

    def settings(self) -> dict[str, Any]:
        """The settings as a config.json has them."""
        own = _KEYS[self.rope_type]
        if self.rope_type == YARN:
            own = (*own, "beta_fast", "beta_slow", "attention_factor", "truncate")
        given = asdict(self)
        return {"rope_type": self.rope_type, **{name: given[name] for name in own if given[name] is not None}}

    @property
    def attention_scale(self) -> float:
        """What cosine and sine are multiplied by; scores of attention are by its square."""
        if self.rope_type != YARN:
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        """Scale the frequencies base^(-2i/d) of a head, float32 [d / 2]."""
        return self._llama3(frequencies) if self.rope_type == LLAMA3 else self._yarn(frequencies, base)

    def _llama3(self, frequencies: Tensor) -> Tensor:
        """Long waves are stretched by the factor, short ones stay, those between are blended (Llama 3.1)."""
        length = self.original_max_position_embeddings
        waves = 2 * math.pi / frequencies
        share = (length / waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * frequencies / self.factor + share * frequencies
        scaled = torch.where(waves > length / self.low_freq_factor, frequencies / self.factor, blended)
        return torch.where(waves < length / self.high_freq_factor, frequencies, scaled)

    def _yarn(self, frequencies: Tensor, base: float) -> Tensor:
        """A ramp over a head's dimensions from unscaled to fully stretched (YaRN, arXiv 2309.00071, section 3.2)."""
        size = 2 * len(frequencies)
        low, high = (self._dimension_of(turns, size, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        places = torch.arange(size // 2, dtype=torch.float32, device=frequencies.device)
        stretched = ((places - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)

    def _dimension_of(self, turns: float, size: int, base: float) -> float:
        """The dimension of a head that turns so often within the first texts' length."""
        length = self.original_max_position_embeddings
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

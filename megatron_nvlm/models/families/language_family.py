"""What a family of language models is: a record of how its models differ from each other's families."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_nvlm.models.families.rope_scaling import LLAMA3, YARN, RopeScaling


@dataclass(frozen=True)
class LanguagePreset:
    """Sizes of one language model; `family` says the rest."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    """Rows of the embedding as stored, padding included."""
    rotary_base: int
    family: str
    """A name of LANGUAGE_FAMILIES."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding."""
    layernorm_epsilon: float = 1e-6
    kv_channels: int | None = None
    """Size of an attention head; None for hidden_size / num_attention_heads."""
    rope_scaling: RopeScaling | None = None

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Of all heads of the queries together."""
        return self.head_size * self.num_attention_heads

    def identity(self) -> str:
        """The sizes as a checkpoint keeps them, where the model has no name.

        Checkpoints of before families were records say `qkv_bias`, and nothing of what came later.
        """
        since = {"kv_channels": None, "rope_scaling": None}
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        family = given.pop("family")
        if family in _NAMED_BY_BIAS:
            given = _insert(given, "rotary_base", "qkv_bias", _NAMED_BY_BIAS[family])
        else:
            given = _insert(given, "rotary_base", "family", family)
        kept = {name: value for name, value in given.items() if name not in since or value != since[name]}
        return f"LanguagePreset({', '.join(f'{name}={value!r}' for name, value in kept.items())})"


_NAMED_BY_BIAS = {"qwen2": True, "llama": False}


def _insert(given: dict[str, Any], behind: str, name: str, value: object) -> dict[str, Any]:
    """A dictionary with one more entry after another."""
    entries = [(key, there) for key, there in given.items()]
    place = next(number for number, (key, _) in enumerate(entries) if key == behind) + 1
    return dict([*entries[:place], (name, value), *entries[place:]])


@dataclass(frozen=True)
class LanguageFamily:
    """A family of decoders with RMSNorm, rotary embedding, grouped queries and SwiGLU, and where it differs from others.

    A new family is a file with such a record and a line in LANGUAGE_FAMILIES.
    """

    name: str
    architecture: str
    """Of Hugging Face transformers."""
    model_type: str
    """Of its config.json."""
    qkv_bias: bool = False
    """Biases of queries, keys and values; nothing else has any."""
    query_key_norm: bool = False
    """RMSNorm of each head of queries and keys, before the rotary embedding."""
    default_head_size: int | None = None
    """Where config.json has no head_dim; None for hidden_size / num_attention_heads."""
    rope_scalings: tuple[str, ...] = (LLAMA3, YARN)
    """Kinds of scaling that its class in transformers honours."""
    scalings_without_effect: tuple[str, ...] = ()
    """Kinds that folders name and that change nothing; the family's file says why."""
    reads_attention_bias: bool = True
    """Whether `attention_bias` means biases of all four projections, which is refused where true."""
    window_key: str | None = None
    """The switch of a sliding window in config.json; None where `sliding_window` itself says it."""
    presets: Mapping[str, LanguagePreset] = field(default_factory=dict)
    """Its models by name."""

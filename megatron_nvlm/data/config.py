"""Section `data` of a run."""

from dataclasses import dataclass, field

from megatron_nvlm.data.order.order import WINDOW_SHARDS
from megatron_nvlm.data.order.packing import PackingConfig
from megatron_nvlm.data.shards.remote import CacheConfig

PREFETCH_SAMPLES = 32


@dataclass(frozen=True)
class DataSource:
    """A set of shards and its share in the blend."""

    path: str
    """A folder, or an address (s3://, http://)."""
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of a run."""

    train: list[DataSource]
    """Sets to train on, with their weights."""
    tokenizer: str
    """Path of a tokenizer.json."""
    sequence_length: int
    """Most decoder tokens of a sample, and of a pack."""
    too_long: str = "reject"
    """What becomes of a sample that is longer with its fewest tiles: reject (a bad sample of the kind too_long), or
    truncate, which leaves out the end of its text."""
    valid: str | None = None
    """A set to answer questions from when training ends."""
    template: str = "chatml"
    system: str | None = "Answer the questions."
    """System turn of samples that have none; null for none."""
    seed: int = 1234
    """Of the order of samples."""
    shuffle_window_shards: int = WINDOW_SHARDS
    """Number of shards whose samples are shuffled together: fewer read more in sequence, more mix better."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    num_workers: int = 0
    """Processes of each rank that read and decode ahead; 0 does it in place."""
    prefetch_samples: int = PREFETCH_SAMPLES
    """Samples that workers prepare ahead on each rank; where ranks share the tiles of a step, the memory for them."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_bad_fraction: float = 0.01
    """Share of bad samples among those consumed past which the run stops."""
    ledger: bool = False
    """Write the keys of each step's samples to ledger.jsonl in the run's folder, for audits."""

"""Sections `data` and `validation` of a run."""

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
    name: str | None = None
    """In metrics; null for the folder's name. Sets of one name are counted together."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or folder_name(self.path)


def folder_name(path: str) -> str:
    """The last part of a folder's path or address."""
    return path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class ValidationSet:
    """A set of shards whose loss is measured while a run trains."""

    path: str
    """A folder, or an address (s3://, http://)."""
    name: str | None = None
    """In metrics; null for the folder's name."""
    samples: int | None = None
    """Number of its samples that are read, evenly spread over the set; null for `validation.samples`."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or folder_name(self.path)


@dataclass(frozen=True)
class ValidationConfig:
    """Section `validation` of a run."""

    sets: list[ValidationSet] = field(default_factory=list)
    """Sets whose loss and token accuracy are measured; none by default."""
    every_steps: int = 500
    """Steps between measurements; there is also one before step 1, and one at the end."""
    samples: int | None = None
    """Number of samples that are read of each set; null for the whole set."""
    text_margin: float = 0.05
    """Rise of a set's text-only loss since the start of the run, in nats a token, above which a warning is written (our
    choice: 5 % more perplexity)."""


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

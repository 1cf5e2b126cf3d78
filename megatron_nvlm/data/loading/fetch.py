"""One place of the order to a prepared sample, or to the record of why it is bad. Runs in workers; knows no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_nvlm.data.order.order import SampleId
from megatron_nvlm.data.prepare import AllocateTiles, BadSample, PreparedSample, SamplePipeline, new_tiles
from megatron_nvlm.data.shards.read import ShardSet, StorageError
from megatron_nvlm.errors import UserError


@dataclass(frozen=True)
class BadRecord:
    """A sample that was skipped, as it stands in the quarantine file."""

    key: str
    """Empty if the sample could not even be read."""
    shard: str
    number: int
    """Of the sample in its set."""
    kind: str
    """record (unreadable or incomplete), image, conversation, too_long or index (not of the size that its index says)."""
    reason: str
    source: str
    """The sample's own; the name of its set if it could not be read."""


@dataclass(frozen=True)
class SampleRequest:
    """What is wanted of which sample."""

    sample: SampleId
    expected_tokens: int | None = None
    """Decoder tokens that a pack has room for; 0 if the index knows the sample to be bad. None: any number."""
    part: tuple[int, int] | None = None
    """Range [start, end) of its tiles to decode; None for all."""


def fetch(
    sets: Sequence[ShardSet],
    pipeline: SamplePipeline,
    request: SampleRequest,
    allocate: AllocateTiles = new_tiles,
) -> PreparedSample | BadRecord:
    """Read and prepare one sample. Its images have the sizes that the index says, so its tokens need no decoding.

    Raises:
        StorageError: its shard cannot be reached, which is no fault of the sample and may be so on one machine only.
    """
    sample, expected_tokens = request.sample, request.expected_tokens
    shards = sets[sample.dataset]
    key, source = "", shards.name
    try:
        try:
            raw = shards.read(sample.number)
        except StorageError:
            raise
        except UserError as error:
            raise BadSample("record", str(error)) from error
        key, source = raw.key, str(raw.record.get("source", shards.name))
        sizes = shards.image_sizes(sample.number)
        prepared = pipeline.prepare(raw, allocate=allocate, sizes=sizes, part=request.part)
        if expected_tokens is not None and len(prepared.sequence.tokens) != expected_tokens:
            raise BadSample(
                "index",
                f"it has {len(prepared.sequence.tokens)} tokens and its index says {expected_tokens}; index it again",
            )
        return replace(prepared, dataset=sample.dataset)
    except BadSample as error:
        return BadRecord(key, shards.shard_of(sample.number), sample.number, error.kind, str(error), source)

"""What a run writes down of its samples: the bad ones always (quarantine.jsonl), all of them if asked (ledger.jsonl)."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.data.loading.loader import MicroBatchLoader

QUARANTINE_FILE = "quarantine.jsonl"
"""One JSON object a bad sample: step, key, shard, number (in its set), kind, reason, source."""
LEDGER_FILE = "ledger.jsonl"
"""One JSON object a step: step, keys (of the samples used, in the order of the run)."""


def open_lines(path: Path, first_step: int) -> TextIO:
    """A file of one JSON object a line, to append to; lines of later steps, which will be made again, are dropped."""
    kept = []
    if path.exists():
        # A process killed while it wrote may leave half a line, which is no step either.
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    path.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a", buffering=1)


class SampleWriter:
    """Writes on rank 0 what all replicas met; every rank calls it.

    Args:
        first_step: steps behind it are about to be made again.
        with_ledger: write the keys of all samples too.
    """

    def __init__(self, run_dir: Path, first_step: int, with_ledger: bool) -> None:
        self.with_ledger = with_ledger
        self.active = dist.get_rank() == 0
        if self.active:
            self._quarantine = open_lines(run_dir / QUARANTINE_FILE, first_step)
            self._ledger = open_lines(run_dir / LEDGER_FILE, first_step) if with_ledger else None

    def write(
        self, step: int, loader: MicroBatchLoader, keys: tuple[tuple[str, ...], ...], bad_samples: int
    ) -> dict[str, int]:
        """Write a step down and return its bad samples by kind and source.

        Args:
            keys: of this rank's micro-batches. bad_samples: over all replicas, so that without any nothing is exchanged.
        """
        if not self.with_ledger and bad_samples == 0:
            return {}
        mine: dict[str, Any] = {"bad": [vars(record) for record in loader.bad], "keys": keys}
        shares: list[dict[str, Any]] = [{}] * parallel_state.get_data_parallel_world_size()
        # Ranks of one replica read the same; one group of data-parallel ranks knows everything.
        dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
        bad = [record for share in shares for record in share["bad"]]
        if self.active:
            for record in bad:
                self._quarantine.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")
            if self._ledger is not None:
                rows = [row for turn in zip(*(share["keys"] for share in shares), strict=True) for row in turn]
                line = {"step": step, "keys": [key for row in rows for key in row]}
                self._ledger.write(json.dumps(line, ensure_ascii=False) + "\n")
        return dict(Counter(f"{record['kind']}/{record['source']}" for record in bad))

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._quarantine.close()
            if self._ledger is not None:
                self._ledger.close()

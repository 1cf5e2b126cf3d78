"""What a run writes down of its samples: the bad ones (quarantine.jsonl), those of updates that were left out
(skipped.jsonl) and, if asked, all of them (ledger.jsonl).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nvlm.data.loading.loader import Loader
from megatron_nvlm.runs.run_dir import RunDir


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


_SHOWN = 8
"""Names of samples in a line on the terminal."""


class SampleWriter:
    """Writes on rank 0 what all replicas met; every rank calls it.

    Args:
        first_step: steps after it are about to be made again.
        with_ledger: write the keys of all samples too.
    """

    def __init__(self, run_dir: RunDir, first_step: int, with_ledger: bool) -> None:
        self.with_ledger = with_ledger
        self.active = dist.get_rank() == 0
        if self.active:
            self._skipped = open_lines(run_dir.skipped, first_step)
            self._quarantine = open_lines(run_dir.quarantine, first_step)
            self._ledger = open_lines(run_dir.ledger, first_step) if with_ledger else None

    def write(self, step: int, loader: Loader, keys: tuple[tuple[str, ...], ...], bad_samples: int) -> dict[str, int]:
        """Write a step down and return its bad samples by kind and source.

        Args:
            keys: of this rank's micro-batches. bad_samples: over all replicas, so that without any nothing is exchanged.
        """
        if not self.with_ledger and bad_samples == 0:
            return {}
        shares = _over_replicas({"bad": [vars(record) for record in loader.bad], "keys": keys})
        bad = [record for share in shares for record in share["bad"]]
        if self.active:
            for record in bad:
                self._quarantine.write(_line({"step": step, **record}))
            if self._ledger is not None:
                self._ledger.write(_line({"step": step, "keys": _in_order(shares)}))
        return dict(Counter(f"{record['kind']}/{record['source']}" for record in bad))

    def write_skipped(self, step: int, reason: str, keys: tuple[tuple[str, ...], ...]) -> None:
        """Name the samples of a step whose update was left out, in a file and on the terminal.

        Args:
            keys: of this rank's micro-batches.
        """
        every = _in_order(_over_replicas({"keys": keys}))
        if self.active:
            self._skipped.write(_line({"step": step, "reason": reason, "keys": every}))
            shown = ", ".join(every[:_SHOWN]) + (" and others" if len(every) > _SHOWN else "")
            print(f"step {step}: the update was left out, since {reason}; its samples: {shown}", flush=True)

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            for file in (self._skipped, self._quarantine, self._ledger):
                if file is not None:
                    file.close()


def _over_replicas(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What each replica found. Ranks of one replica read the same; one group of data-parallel ranks knows everything."""
    shares: list[dict[str, Any]] = [{}] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
    return shares


def _in_order(shares: list[dict[str, Any]]) -> list[str]:
    """The samples' keys in the order of the run: micro-batches go to the replicas in turn."""
    turns = zip(*(share["keys"] for share in shares), strict=True)
    return [key for turn in turns for micro_batch in turn for key in micro_batch]


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"

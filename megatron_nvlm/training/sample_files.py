"""What a run writes down of its samples: the bad ones always (quarantine.jsonl), all of them if asked (ledger.jsonl)."""

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
            self._quarantine = open_lines(run_dir.quarantine, first_step)
            self._ledger = open_lines(run_dir.ledger, first_step) if with_ledger else None

    def write(self, step: int, loader: Loader, keys: tuple[tuple[str, ...], ...], bad_samples: int) -> dict[str, int]:
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
                turns = zip(
                    *(share["keys"] for share in shares), strict=True
                )  # micro-batches go to the replicas in turn
                line = {"step": step, "keys": [key for turn in turns for micro_batch in turn for key in micro_batch]}
                self._ledger.write(json.dumps(line, ensure_ascii=False) + "\n")
        return dict(Counter(f"{record['kind']}/{record['source']}" for record in bad))

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._quarantine.close()
            if self._ledger is not None:
                self._ledger.close()

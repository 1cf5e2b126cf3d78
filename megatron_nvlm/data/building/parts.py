"""Finished blocks of a build that is not finished: their index rows, their rejects, and what they were read from."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_nvlm.data.building.changes import BlockFiles
from megatron_nvlm.data.shards.index import ShardEntries
from megatron_nvlm.whole_files import write_whole_text

PlacesOf = Callable[[int], str]
"""Of a block: `BlockFiles.places` as they are now."""


class Parts:
    """The folder `parts` of a build. A block is finished when its `.json` is there, which is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, block: int, suffix: str) -> Path:
        """A block's file of one kind."""
        return self.folder / f"{block:06d}.{suffix}"

    def has(self, block: int) -> bool:
        """Whether a block is finished."""
        return self.path(block, "json").is_file()

    def finish(self, block: int, rows: ShardEntries, facts: dict[str, Any], used: BlockFiles) -> None:
        """Keep what a block gave, all or nothing."""
        if len(rows.samples):
            rows.save(self.path(block, "npz"))
        write_whole_text(self.path(block, "files"), used.to_json())
        write_whole_text(self.path(block, "json"), json.dumps(facts))

    def read(self, block: int) -> dict[str, Any]:
        """What `finish` kept: number of samples, rejects, what was not read."""
        facts: dict[str, Any] = json.loads(self.path(block, "json").read_text(encoding="utf-8"))
        return facts

    def read_all(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All finished blocks, in order."""
        for block in sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json")):
            yield block, self.read(block)

    def rows(self) -> list[ShardEntries]:
        """Index rows of all blocks that have samples, in order."""
        return [ShardEntries.load(self.path(block, "npz")) for block, part in self.read_all() if part["samples"]]

    @property
    def num_rejects(self) -> int:
        """Of all finished blocks."""
        return sum(len(part["rejects"]) for _, part in self.read_all())

    def digests(self) -> list[str]:
        """`BlockFiles.digest` of each finished block."""
        stored = (self.path(block, "files") for block, _ in self.read_all())
        return [BlockFiles.from_json(path.read_text(encoding="utf-8")).digest for path in stored]

    def forget(self, block: int) -> None:
        """Have a block built again."""
        self.path(block, "json").unlink()

    def forget_changed(self, places_of: PlacesOf) -> str | None:
        """Have the blocks built again whose inputs have changed since, or of which that is not known.

        Returns:
            The first file that has changed, if any.
        """
        first = None
        for block, _ in list(self.read_all()):
            stored = self.path(block, "files")
            used = BlockFiles.from_json(stored.read_text(encoding="utf-8")) if stored.is_file() else None
            changed = used.changed() if used is not None else None
            if used is None or changed is not None or used.places != places_of(block):
                self.forget(block)
            first = first or changed
        return first

    def changed_file(self) -> str | None:
        """The first file of the finished blocks that is no longer as it was; None if all are."""
        stored = (self.path(block, "files") for block, _ in self.read_all())
        used = (BlockFiles.from_json(path.read_text(encoding="utf-8")) for path in stored if path.is_file())
        return next(filter(None, (block.changed() for block in used)), None)

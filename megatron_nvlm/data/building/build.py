"""Many processes write shards; what they write depends on the input and the settings alone.

The numbered samples of all inputs, in order (or shuffled by a seed), are cut into blocks of equal length; a block becomes
one shard. A finished block leaves its index rows and its rejects in `parts/`, so that a build that was killed goes on with
the blocks that are not there yet. The index comes last but one, the manifest last: without them it is no set.
"""

import dataclasses
import fcntl
import hashlib
import json
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import features
from tqdm import tqdm

import megatron_nvlm
from megatron_nvlm.data.building.changes import BlockFiles, first_written_after, hash_places, name_changed
from megatron_nvlm.data.building.inputs import Input
from megatron_nvlm.data.building.parts import Parts
from megatron_nvlm.data.building.report import REPORT_FILES
from megatron_nvlm.data.building.samples import TILE_FIELDS, SampleSettings, Stored, make_sample, unread_parts
from megatron_nvlm.data.building.workers import Workers
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.order.shuffle import round_keys, shuffled
from megatron_nvlm.data.shards.index import IMAGES_FILE, INDEX_FILE, SAMPLES_FILE, write_index
from megatron_nvlm.data.shards.write import shard_name, write_shard
from megatron_nvlm.errors import UserError
from megatron_nvlm.whole_files import write_whole_text

MANIFEST_FILE, REJECTS_FILE, PARTS, PLAN_FILE, LOCK_FILE = (
    "manifest.json",
    "rejects.jsonl",
    "parts",
    "plan.json",
    "lock",
)
_SAMPLES_MEASURED = 32
"""Samples made before the build to see how many fit into a shard."""
_OWN_FILES = (
    "shard-*.tar",
    "shard-*.partial",
    INDEX_FILE,
    SAMPLES_FILE,
    IMAGES_FILE,
    MANIFEST_FILE,
    REJECTS_FILE,
    *REPORT_FILES,
)
_MOST_UNREAD = 50
"""Names of fields and members that the report lists."""


@dataclass(frozen=True)
class BuildSettings:
    """What decides the bytes of a set, beside its input."""

    sample: SampleSettings
    shard_megabytes: float = 256
    """Approximate size of a shard: a few samples are measured to see how many fit."""
    samples_per_shard: int | None = None
    """Instead of a size."""
    shuffle_seed: int | None = None
    max_reject_rate: float = 0.01


@dataclass(frozen=True)
class Reject:
    """An input that gave no sample."""

    where: str
    reason: str
    number: int | None = None
    """In the order of all inputs; None for what could not be numbered."""


class Builder:
    """One build. `folder` is the set's."""

    def __init__(
        self, inputs: Sequence[Input], folder: Path, settings: BuildSettings, count_text: TextTokenCounter | None
    ) -> None:
        self.inputs, self.folder, self.settings, self.count_text = list(inputs), folder, settings, count_text
        self.ends: list[int] = []
        self._opened = BlockFiles()
        for source in self.inputs:
            self._opened.add_files(source.containers)
            self.ends.append((self.ends[-1] if self.ends else 0) + len(source))
        self.num_inputs = self.ends[-1] if self.ends else 0
        if self.num_inputs == 0:
            told = ", ".join(f"{count} {name}" for source in self.inputs for name, count in source.unread.items())
            told = f" (not read: {told[:200]})" if told else ""
            told = next((f" ({fault})" for source in self.inputs for fault in source.faults), told)
            raise UserError(f"the input holds no sample{told}; correct --jsonl, --folder or --webdataset")
        self.parts = Parts(folder / PARTS)
        self.per_shard = 0
        self._shuffle_keys = round_keys(settings.shuffle_seed) if settings.shuffle_seed is not None else None

    # ---- the whole

    def run(self, num_processes: int, progress: bool = True, rebuild: bool = False) -> dict[str, Any]:
        """Build what is not there yet; returns the manifest.

        Args:
            rebuild: begin again, whatever the folder holds of a build.

        Raises:
            UserError: too many rejects, the folder holds something else, or a finished set could now have more samples.
        """
        finished = self.folder / MANIFEST_FILE
        if finished.is_file() and not rebuild:
            return self._read_finished(finished)
        if (self.folder / INDEX_FILE).exists() and not (self.parts.folder.exists() or finished.is_file()):
            raise UserError(f"{self.folder} already holds shards of another kind; give another --out")
        self.parts.folder.mkdir(parents=True, exist_ok=True)
        with (self.parts.folder / LOCK_FILE).open("w") as lock:
            self._take(lock)
            if finished.is_file() and not rebuild:  # by another build that was waited for
                return self._read_finished(finished)
            if rebuild:
                self._clear()
            self._plan()
            self.parts.forget_changed(self._places)
            self._forget_mended_blocks()
            self._build_blocks(num_processes, progress)
            changed = self._opened.changed() or self.parts.forget_changed(self._places)
            if changed:
                raise UserError(f"{changed} was written while the shards were built; repeat the command, which goes on")
            manifest = self._finish()
        shutil.rmtree(self.parts.folder)
        return manifest

    def _read_finished(self, finished: Path) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        self._refuse_other_plan(manifest["plan"])
        self._refuse_changed_inputs(finished, manifest)
        return manifest

    def _clear(self) -> None:
        """Remove what a build has written, and nothing else."""
        own = [path for pattern in _OWN_FILES for path in self.folder.glob(pattern)]
        for path in [*own, *self.parts.folder.iterdir()]:
            if path.name != LOCK_FILE:
                path.unlink()

    def _is_mended(self, reject: dict[str, Any]) -> bool:
        """Whether an input that was rejected gives a sample now."""
        if reject.get("number") is None:
            return False
        try:
            self._make(reject["number"])
        except UserError:
            return False
        return True

    def _forget_mended_blocks(self) -> None:
        """Blocks with rejects that are samples by now are built again."""
        for block, part in list(self.parts.read_all()):
            if any(self._is_mended(reject) for reject in part["rejects"]):
                self.parts.forget(block)

    def _refuse_changed_inputs(self, finished: Path, manifest: dict[str, Any]) -> None:
        """Refuse to call a set built whose inputs have changed since: what was good, and what was rejected."""
        path = self.folder / REJECTS_FILE
        rejects = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        good = [reject["where"] for reject in rejects if self._is_mended(reject)]
        if good:
            raise UserError(
                f"{self.folder} was built without {len(good)} inputs that are good by now, {good[0]} first; give "
                "--rebuild to build it again, or another --out"
            )
        built = finished.stat().st_mtime_ns
        changed = next(filter(None, (first_written_after(source, built) for source in self.inputs)), None)
        advice = "give --rebuild to build it again, or another --out"
        if changed is not None:
            raise UserError(f"{changed} was written after {self.folder} was built of it; {advice}")
        self.per_shard = manifest["plan"]["samples_per_shard"]
        blocks = (map(self._place, self._numbers_of(block)) for block in range(self.num_blocks))
        replaced = name_changed(blocks, manifest.get("files_of_blocks", ()))
        if replaced is not None:
            raise UserError(f"{replaced} was replaced after {self.folder} was built of it; {advice}")

    def _take(self, lock: Any) -> None:
        for _ in range(50):  # the processes of a build that was just killed end within a second
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.1)
        raise UserError(f"another build is writing into {self.folder}; wait for it or give another --out")

    # ---- the plan

    def _facts(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        del settings["max_reject_rate"]  # may be raised for another try
        return {
            "inputs": [
                {
                    "kind": one.kind,
                    "path": str(one.path),
                    "samples": len(one),
                    "fingerprint": one.fingerprint,
                    **one.elsewhere,
                }
                for one in self.inputs
            ],
            "settings": {**settings, "sample": self.settings.sample.describe()},
            "text": dataclasses.asdict(self.count_text.description) if self.count_text else None,
        }

    def _plan(self) -> None:
        path = self.parts.folder / PLAN_FILE
        if path.is_file():
            plan = json.loads(path.read_text(encoding="utf-8"))
            self.per_shard = plan["samples_per_shard"]
            if self._differs_from(plan) is None:
                return
            if any(part["samples"] for _, part in self.parts.read_all()):
                self._refuse_other_plan(plan)
            self._clear()  # a first try with a wrong option has made nothing
        self.per_shard = self.settings.samples_per_shard or self._measure()
        write_whole_text(path, json.dumps({**self._facts(), "samples_per_shard": self.per_shard}))

    def _differs_from(self, plan: dict[str, Any]) -> str | None:
        return next((name for name, ours in json.loads(json.dumps(self._facts())).items() if plan[name] != ours), None)

    def _refuse_other_plan(self, plan: dict[str, Any]) -> None:
        name = self._differs_from(plan)
        if name is not None:
            changed = self.parts.changed_file() if name == "inputs" else None
            others = f"from other inputs ({changed} has changed)" if changed else "from other inputs"
            what = {"inputs": others, "text": "with another tokenizer, template or system turn"}
            raise UserError(
                f"{self.folder} holds a build {what.get(name, 'with other settings')}; repeat its command, or give "
                "--rebuild or another --out"
            )

    def _measure(self) -> int:
        """Samples that a shard of the wished size holds, from a few made as they will be."""
        step = max(1, self.num_inputs // _SAMPLES_MEASURED)
        sizes = []
        for number in range(0, self.num_inputs, step):
            try:
                record, pictures = self._make(number)
            except UserError:
                continue
            members = [len(json.dumps(record)), *map(len, pictures.values())]
            sizes.append(sum(512 + -(-size // 512) * 512 for size in members))
        mean = sum(sizes) / len(sizes) if sizes else 1
        return max(1, round(self.settings.shard_megabytes * 1e6 / mean))

    @property
    def num_blocks(self) -> int:
        """Shards, before empty ones are left out."""
        return -(-self.num_inputs // self.per_shard)

    # ---- one block, in a process of its own

    def _place(self, number: int) -> tuple[Input, int]:
        source = bisect_right(self.ends, number)
        return self.inputs[source], number - (self.ends[source - 1] if source else 0)

    def _numbers_of(self, block: int) -> Iterator[int]:
        """The numbers of a block's samples in the order of all inputs."""
        for place in range(block * self.per_shard, min((block + 1) * self.per_shard, self.num_inputs)):
            yield place if self._shuffle_keys is None else shuffled(place, self.num_inputs, self._shuffle_keys)

    def _places(self, block: int) -> str:
        return hash_places(source.where(inside) for source, inside in map(self._place, self._numbers_of(block)))

    def _make(self, number: int, unread: Counter[str] | None = None) -> Stored:
        source, place = self._place(number)
        sample = source.read(place)
        if unread is not None:
            unread.update(unread_parts(sample, self.settings.sample))
        record, pictures = make_sample(sample, self.settings.sample)
        if self.count_text is not None:
            self.count_text(record)  # what cannot be tokenised is rejected now
        return record, pictures

    def build_block(self, block: int, on_sample: Any = lambda: None) -> None:
        """Write a block's shard, its index rows and its rejects, all or nothing."""
        rejects: list[Reject] = []
        unread: Counter[str] = Counter()
        used = BlockFiles(self._places(block))

        def samples() -> Iterator[tuple[str, dict[str, Any], dict[str, bytes]]]:
            for number in self._numbers_of(block):
                used.add(*self._place(number))
                try:
                    record, pictures = self._make(number, unread)
                    yield f"{self.folder.name.replace('.', '-')}-{number:09d}", record, pictures
                except UserError as error:
                    source, inside = self._place(number)
                    rejects.append(Reject(source.where(inside), str(error), number))
                on_sample()

        path = self.folder / shard_name("shard", block)
        rows = write_shard(path, samples(), self.count_text)
        if not len(rows.samples):
            path.unlink()
        told = [dataclasses.asdict(reject) for reject in rejects]
        facts = {"samples": len(rows.samples), "rejects": told, "unread": dict(unread.most_common(_MOST_UNREAD))}
        self.parts.finish(block, rows, facts, used)

    # ---- all blocks

    def _build_blocks(self, num_processes: int, progress: bool) -> None:
        todo = [block for block in range(self.num_blocks) if not self.parts.has(block)]
        done = self.num_inputs - sum(min(self.per_shard, self.num_inputs - block * self.per_shard) for block in todo)
        bar = tqdm(total=self.num_inputs, initial=done, unit="sample", disable=not progress, smoothing=0.05)
        with bar, Workers(self.build_block, max(1, min(num_processes, len(todo))), done) as workers:
            blocks = workers.submit(todo)
            running = set(blocks)
            rejected = self._count_rejects()
            try:
                while running:
                    finished, running = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                        rejected += len(self.parts.read(blocks[future])["rejects"])
                    bar.update(workers.num_done - bar.n)
                    self._check_rejects(rejected)
            except BrokenExecutor as error:
                raise UserError(
                    "a process of the build was killed, by lack of memory perhaps; the same command goes on, with fewer "
                    "--processes if need be"
                ) from error

    def _count_rejects(self) -> int:
        return sum(len(source.faults) for source in self.inputs) + self.parts.num_rejects

    def _check_rejects(self, rejected: int) -> None:
        """Stop as soon as the rate over the whole input must be too high."""
        total = self.num_inputs + sum(len(source.faults) for source in self.inputs)
        if rejected > self.settings.max_reject_rate * total:
            self._write_rejects()
            raise UserError(
                f"{rejected} of {total} inputs were rejected, over the rate of "
                f"{self.settings.max_reject_rate:g} that --max-reject-rate sets; see {self.folder / REJECTS_FILE}"
            )

    def _write_rejects(self) -> list[Reject]:
        rejects = [Reject(str(source.path), fault) for source in self.inputs for fault in source.faults]
        rejects += [Reject(**reject) for _, part in self.parts.read_all() for reject in part["rejects"]]
        lines = (json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
        write_whole_text(self.folder / REJECTS_FILE, "".join(lines))
        return rejects

    # ---- the end

    def _finish(self) -> dict[str, Any]:
        self._check_rejects(self._count_rejects())
        rejects = self._write_rejects()
        rows = self.parts.rows()
        text = self.count_text.description if self.count_text else None
        settings = self.settings.sample.describe()
        if not any(part.samples["num_tiles"].any() for part in rows):  # text fits any size of tiles
            settings = {name: value for name, value in settings.items() if name not in TILE_FIELDS}
        write_index(self.folder, rows, settings, text)
        index = json.loads((self.folder / INDEX_FILE).read_text())
        unread: Counter[str] = Counter()
        for source in self.inputs:
            unread.update(source.unread)
        for _, part in self.parts.read_all():
            unread.update(part.get("unread", {}))  # a build that was begun before has none
        counts = {name: index[name] for name in ("num_samples", "num_images", "num_tiles", "num_text_tokens")}
        manifest = {
            "format": 1,
            "tool": f"megatron_nvlm {megatron_nvlm.__version__} tools/build_shards.py",
            "libraries": {"pillow": PIL.__version__, "jpeg": features.version("jpg"), "zlib": features.version("zlib")},
            "plan": {**json.loads(json.dumps(self._facts())), "samples_per_shard": self.per_shard},
            "counts": {"num_inputs": self.num_inputs, "num_rejects": len(rejects), **counts},
            "rejects_by_reason": dict(Counter(_kind(reject.reason) for reject in rejects).most_common(20)),
            "unread": dict(unread.most_common(_MOST_UNREAD)),
            "shards": index["shards"],
            "files_of_blocks": self.parts.digests(),
            "index_sha256": hashlib.sha256((self.folder / INDEX_FILE).read_bytes()).hexdigest(),
        }
        write_whole_text(self.folder / MANIFEST_FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return manifest


def _kind(reason: str) -> str:
    """A reason without its particulars, to count by."""
    return reason.split(" (")[0].split("'")[0][:60].strip()

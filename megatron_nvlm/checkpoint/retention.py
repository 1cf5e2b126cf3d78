"""Which checkpoints of a run there are, which one is newest, and which ones go."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

LATEST_FILE = "latest"


def step_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 if it is no such name."""
    number = path.name.removeprefix("step_")
    return int(number) if path.name.startswith("step_") and number.isdigit() else -1


def read_latest(folder: Path) -> Path | None:
    """What `latest` in a run's `checkpoints/` names, there or not; None without the file or with an empty one."""
    file = folder / LATEST_FILE
    name = file.read_text().strip() if file.is_file() else ""
    return folder / name if name else None


def candidates(folder: Path) -> list[Path]:
    """What a run may go on from, best first: what `latest` names, then the earlier ones, the newest of them first."""
    named = read_latest(folder)
    others = sorted((path for path in folder.glob("step_*") if step_of(path) >= 0), key=step_of, reverse=True)
    if named is None:
        return others
    earlier = [path for path in others if path != named and (step_of(named) < 0 or step_of(path) < step_of(named))]
    return [named, *earlier]


def write_latest(folder: Path, name: str) -> None:
    """Name the newest complete checkpoint, atomically: a reader sees the old name or the new one."""
    partial = folder / f"{LATEST_FILE}.partial"
    with partial.open("w") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / LATEST_FILE)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(
    folder: Path,
    keep_last: int,
    keep_every_steps: int | None,
    newest: Path,
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> None:
    """Remove all but the last `keep_last` checkpoints up to `newest` and those of every `keep_every_steps`-th step.

    Damaged ones go as well: counted, they would push out those that a run can still go back to. Later ones than `newest`
    (a run that went back) stay until the run comes to them and writes them again.
    """
    earlier = sorted((path for path in folder.glob("step_*") if 0 <= step_of(path) < step_of(newest)), key=step_of)
    complete = [path for path in earlier if is_whole(path)]
    for path in set(earlier) - set(complete):
        remove_checkpoint(path)
    for path in complete[: max(0, len(complete) - (keep_last - 1))]:
        if keep_every_steps is None or step_of(path) % keep_every_steps:
            remove_checkpoint(path)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, by another name first: one that is removed in part must not look like one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)

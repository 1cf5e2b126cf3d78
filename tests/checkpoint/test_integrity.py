"""What is wrong with a checkpoint is found and said, and retention keeps what it should."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from megatron_nvlm.checkpoint import integrity, retention
from megatron_nvlm.checkpoint.save_load import find_checkpoint
from megatron_nvlm.errors import UserError


def write_checkpoint(folder: Path) -> Path:
    """A real one of torch's format, with what ours adds."""
    torch_save({"weight": torch.arange(1000.0)}, checkpoint_id=str(folder), no_dist=True)
    (folder / integrity.IDENTITY_FILE).write_text(json.dumps({"model": {}, "progress": {}}))
    integrity.write_sums_of_rank(folder, 0)
    integrity.write_manifest(folder)
    return folder


def data_file(folder: Path) -> Path:
    return next(folder.glob("__0_*.distcp"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "is missing": (lambda folder: data_file(folder).unlink(), "size"),
    "bytes instead of": (lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1]), "size"),
    "has a wrong checksum": (lambda folder: flip_a_byte(data_file(folder)), "checksum"),
    ".metadata is missing": (lambda folder: (folder / ".metadata").unlink(), "size"),
    "metadata cannot be read: JSONDecodeError": (
        lambda folder: (folder / integrity.MANIFEST_FILE).write_text("{"),
        "size",
    ),
    "metadata cannot be read: FileNotFoundError": (
        lambda folder: (folder / integrity.IDENTITY_FILE).unlink(),
        "size",
    ),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damage_is_named(tmp_path: Path, says: str) -> None:
    folder = write_checkpoint(tmp_path / "step_00000002")
    assert integrity.find_damage(folder, "checksum") == ""
    damage, verify = DAMAGES[says]
    damage(folder)
    shares = [integrity.find_damage(folder, verify, (rank, 3)) for rank in range(3)]
    assert says in "".join(shares)
    assert says in integrity.find_damage(folder, verify)


def test_a_checkpoint_without_manifest_needs_readable_metadata(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "imported")
    (folder / integrity.MANIFEST_FILE).unlink()
    assert integrity.find_damage(folder, "checksum") == ""
    (folder / ".metadata").write_bytes(b"damaged")
    assert "metadata cannot be read" in integrity.find_damage(folder, "size")


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoints" / "step_00000002")
    retention.write_latest(folder.parent, folder.name)
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == folder
    data_file(folder).unlink()
    for name in (folder, tmp_path):
        with pytest.raises(UserError, match=r"step_00000002 is damaged \(__0_0.distcp is missing\); restore it"):
            find_checkpoint(name)


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    kept = []
    for step in range(2, 22, 2):
        (tmp_path / retention.step_folder(step)).mkdir()
        retention.remove_old(tmp_path, 2, 6, tmp_path / retention.step_folder(step))
        kept = sorted(retention.step_of(path) for path in tmp_path.glob("step_*"))
    assert kept == [6, 12, 18, 20]


def test_a_run_that_went_back_does_not_lose_what_it_went_back_to(tmp_path: Path) -> None:
    for step in (4, 6, 8):
        (tmp_path / retention.step_folder(step)).mkdir()
    (tmp_path / ".step_00000008.partial").mkdir()
    retention.remove_old(tmp_path, 2, None, tmp_path / retention.step_folder(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [retention.step_folder(step) for step in (4, 6, 8)]


def test_a_damaged_checkpoint_pushes_out_no_good_one(tmp_path: Path) -> None:
    for step in (2, 4, 5):
        (tmp_path / retention.step_folder(step)).mkdir()
    good = {retention.step_folder(step) for step in (2, 5)}
    retention.remove_old(
        tmp_path, 2, None, tmp_path / retention.step_folder(5), is_whole=lambda path: path.name in good
    )
    assert {path.name for path in tmp_path.iterdir()} == good


def test_candidates_begin_with_latest_and_go_back(tmp_path: Path) -> None:
    assert retention.candidates(tmp_path) == []
    for step in (2, 4, 10):
        (tmp_path / retention.step_folder(step)).mkdir()

    def steps() -> list[int]:
        return [retention.step_of(path) for path in retention.candidates(tmp_path)]

    assert steps() == [10, 4, 2]
    retention.write_latest(tmp_path, retention.step_folder(4))
    assert steps() == [4, 2]
    retention.write_latest(tmp_path, retention.step_folder(6))
    assert steps() == [6, 4, 2]

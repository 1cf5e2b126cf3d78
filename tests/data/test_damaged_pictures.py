"""Sets of damaged pictures: lint, the index and the training's reader end with a sentence a sample, each naming it."""

from pathlib import Path

import pytest

from megatron_nvlm.data.building.lint import Check, lint
from megatron_nvlm.data.loading.builder import BatchSettings
from megatron_nvlm.data.loading.loader import MicroBatchLoader
from megatron_nvlm.data.order.batches import DataPosition
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import decode_image, read_header
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.loaders import data_config, open_set
from tests.support.pictures import NAMES, avif_with_a_hole, damaged_files, unreadable_exif
from tests.support.shards import Sample, record, write_samples

FILES = [*damaged_files(50), ("WEBP", unreadable_exif()), ("AVIF", avif_with_a_hole())]


def is_refused(read: object, data: bytes) -> bool:
    try:
        read(data)  # type: ignore[operator]
    except UserError:
        return True
    return False


@pytest.fixture(scope="module")
def refused() -> dict[str, str]:
    """Keys of the samples whose picture cannot be decoded, and the picture's member."""
    named = ((f"sample_{number:04d}", f"0.{NAMES[kind]}", data) for number, (kind, data) in enumerate(FILES))
    return {key: member for key, member, data in named if is_refused(decode_image, data)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples: list[Sample] = [(record("?", "yes"), {f"0.{NAMES[kind]}": data}) for kind, data in FILES]
    return write_samples(tmp_path_factory.mktemp("damaged") / "shards", samples, samples_per_shard=64)


def test_lint_names_each_sample(folder: Path, refused: dict[str, str]) -> None:
    faults = lint(folder, Check()).faults
    assert {fault.place.rpartition(" ")[2] for fault in faults} == refused.keys() and len(faults) == len(refused)
    for fault in faults:
        assert fault.kind == "image" and fault.message.startswith(f"its {refused[fault.place.rpartition(' ')[2]]}: ")
        assert "\n" not in str(fault)


def test_lint_of_headers_alone_names_those_without_one(folder: Path) -> None:
    faults = lint(folder, Check(decode=False)).faults
    expected = {number for number, (_, data) in enumerate(FILES) if is_refused(read_header, data)}
    assert {int(fault.place.rpartition("_")[2]) for fault in faults} == expected
    assert len(FILES) - 2 in expected  # its orientation cannot be read


@pytest.mark.parametrize("workers", [0, 1])
def test_training_passes_over_each_and_names_it(folder: Path, refused: dict[str, str], workers: int) -> None:
    data = open_set(folder, Tokenizer(qwen2_tokenizer(1024)))
    loader = MicroBatchLoader(data, BatchSettings(1, len(FILES)), data_config(num_workers=workers))
    try:
        seen = {key for row in loader.step(DataPosition()) for key in row.keys}
        bad = {one.key: one for one in loader.bad}
    finally:
        loader.close()
    assert bad.keys() == refused.keys() and len(seen) + len(bad) == len(FILES)
    for key, one in bad.items():
        assert one.kind == "image" and one.reason.startswith(f"its {refused[key]}: the image")

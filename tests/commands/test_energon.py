"""Megatron-Energon reads our shards: an independent reader of the same tars (skipped where it is not installed)."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.shards import good_samples, write_samples

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.energon") is None,
    reason="megatron-energon is not installed (it wants another tzdata; docs/data.md says how)",
)

READER = """
import json, sys
from pathlib import Path
import yaml
from megatron.energon import (Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass,
                              get_loader, get_val_dataset, stateless)
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

folder = Path(sys.argv[1])
BaseWebdatasetFactory.prepare_dataset(
    folder, sorted(path.name for path in folder.glob("*.tar")), split_parts_ratio=[("train", 1.0)], workers=1
)
kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
(folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(kind))

@edataclass
class Stored(Sample):
    key: str
    images: int
    answer: str
    sizes: list

@stateless
def cook(sample):
    pictures = [value for name, value in sorted(sample.items()) if name.endswith(".png")]
    record = sample["json"]
    return Stored(
        **basic_sample_keys(sample), key=sample["__key__"], images=len(record["images"]),
        answer=record["conversation"][-1]["value"], sizes=[list(one.shape[1:]) for one in pictures],
    )

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

    @stateless
    def batch(self, samples):
        return samples

workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
found = get_val_dataset(folder, split_part="train", worker_config=workers, batch_size=1, task_encoder=Encoder())
for batch in get_loader(found):
    for sample in batch:
        print("SAMPLE", json.dumps([sample.images, sample.answer, sample.sizes]))
"""


def test_energon_reads_every_sample(tmp_path: Path) -> None:
    samples = good_samples(12)
    folder = write_samples(tmp_path / "set", samples)
    (tmp_path / "reader.py").write_text(READER)
    shown = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py"), str(folder)], capture_output=True, text=True, timeout=300
    )
    read = sorted(line[7:] for line in shown.stdout.splitlines() if line.startswith("SAMPLE"))
    expected = []
    for record, pictures in samples:
        sizes = [list(Image.open(io.BytesIO(data)).size[::-1]) for data in pictures.values()]
        expected.append(json.dumps([len(record["images"]), record["conversation"][-1]["value"], sizes]))
    assert read == sorted(expected), shown.stderr[-2000:]

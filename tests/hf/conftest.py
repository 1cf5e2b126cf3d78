"""Nothing of these tests reaches a hub, and none of its caches outside a temporary folder."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron_nvlm.parallel.device import Device
from tests.hf.folders import VARIANT_NAMES, write_folder
from tests.support.tiny import tiny_config, tiny_model

os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf_home_"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, world_of_one: Device) -> Path:
    """A folder with an exported folder of each variant, by its name."""
    root = tmp_path_factory.mktemp("exported")
    for variant in VARIANT_NAMES:
        write_folder(root / variant, tiny_model(tiny_config(variant), world_of_one), tiny_config(variant))
    return root

#!/usr/bin/env bash
# What an image holds beside NVIDIA's: run in a copy of this repository while the image is built (Dockerfile,
# launch/apptainer.def), with MEGATRON_CORE set to the version of requirements-ci.txt.
set -euo pipefail

# torch, Transformer Engine, apex and triton of NVIDIA's image fit each other; installing ours must not replace them.
constraints=$(mktemp)
pip list --format=freeze | grep -iE '^(torch|transformer[-_]engine[a-z_-]*|apex|triton|pytorch[-_]triton)==' >"$constraints"
pip install --no-cache-dir --constraint "$constraints" "megatron-core==$MEGATRON_CORE" --editable '.[demo]'

python - "$constraints" <<'END'
import re
import sys
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

for line in Path(sys.argv[1]).read_text().split():
    name, pinned = line.split("==")
    if version(name) != pinned:
        raise SystemExit(f"{name} of the image was replaced: {pinned} before, {version(name)} now")
if find_spec("apex") is None:
    raise SystemExit("this image has no apex; take another release of NVIDIA's PyTorch image")
asked = [Requirement(text) for text in requires("megatron-core") or () if text.startswith("transformer-engine")]
range_of_core = asked[0].specifier if asked else SpecifierSet()
found = re.sub(r"\+.*", "", version("transformer-engine"))
if not range_of_core.contains(found, prereleases=True):
    raise SystemExit(f"Megatron-core asks for Transformer Engine {range_of_core} and the image has {found}")
END

"""Real builds of a few samples: what became of each, or the sentence by which it was rejected."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_nvlm.commands.build_shards import main
from megatron_nvlm.data.shards.read import ShardSet
from megatron_nvlm.data.shards.records import RawSample

Member = tuple[str, bytes | str | tuple[bytes, str]]
"""Name, and content or (type, target) of a link."""
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def coloured(colour: str, kind: str = "PNG") -> bytes:
    """A picture that is told by its colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), COLOURS[colour]).save(buffer, kind)
    return buffer.getvalue()


def colours_of(sample: RawSample) -> list[str]:
    """The colours of a sample's pictures, in their order."""
    found = []
    for number in range(len(sample.record["images"])):
        (data,) = [data for name, data in sample.pictures.items() if name.split(".")[0] == str(number)]
        pixel = Image.open(io.BytesIO(data)).convert("RGB").getpixel((30, 30))
        found.append(min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True))))
    return found


def write_tar(path: Path, members: Sequence[Member], **options: Any) -> Path:
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
                continue
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def build(out: Path, *source: object, images: str = "whole") -> tuple[list[RawSample], list[str]]:
    """Samples and sentences of the rejects; the command refuses a set without any sample."""
    defaults = ("--images", images, "--processes", "1", "--quiet", "--max-reject-rate", "1", "--tile-size", "56")
    try:
        main(["--out", str(out), *map(str, source), *defaults])
    except SystemExit:
        if not (out / "rejects.jsonl").exists():
            raise
    shards = ShardSet(out) if (out / "index.json").exists() else []
    rejects = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return [shards.read(number) for number in range(len(shards))], [json.loads(line)["reason"] for line in rejects]


def build_lines(folder: Path, *lines: dict[str, Any] | str | bytes) -> tuple[list[RawSample], list[str]]:
    """From JSON lines beside red.png, green.png and blue.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(coloured(colour))
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    data = b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded)
    (folder / "data.jsonl").write_bytes(data + b"\n")
    return build(folder / "set", "--jsonl", folder / "data.jsonl")


def build_tar(folder: Path, *members: Member, **options: Any) -> tuple[list[RawSample], list[str]]:
    """From one WebDataset tar."""
    write_tar(folder / "tars" / "000.tar", members, **options)
    return build(folder / "set", "--webdataset", folder / "tars")


def turns_of(sample: RawSample) -> list[tuple[str, str]]:
    """(role, text) of each turn."""
    return [(turn["from"], turn["value"]) for turn in sample.record["conversation"]]


def hashes(out: Path) -> dict[str, str]:
    """Of a set's shards and index; the manifest names the inputs' files."""
    files = [*out.glob("shard-*.tar"), *out.glob("*.npy"), out / "index.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

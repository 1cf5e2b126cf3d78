"""Pictures and text to try the tools on and to measure with: `python -m megatron_nvlm.demo.material --out DIR`.

Everything is made at run time from installed packages, each under a free licence (DIR/licences.json names them). PyPI's:
scikit-learn, and if installed scikit-image, easy-vqa and reasoning-gym. Debian's, if installed: fonts-noto-color-emoji
with unicode-data, iso-flags-png-320x240 with iso-codes, wordnet-base. What is not installed is said and left out. The
same packages give the same bytes.

DIR gets images/, images.jsonl (pictures with a question and an answer), text.jsonl, tokenizer.json and licences.json, and
with --shards shards/images and shards/text.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nvlm.commands import build_shards
from megatron_nvlm.data.building import material_debian, material_pypi
from megatron_nvlm.data.building.material import Item, Source
from megatron_nvlm.errors import UserError
from megatron_nvlm.option_types import natural_int, positive_float, tile_pixels
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer

SOURCES: Sequence[Source] = (*material_pypi.SOURCES, *material_debian.SOURCES)


@dataclass(frozen=True)
class Made:
    """What became of a source."""

    source: Source
    items: int
    note: str


def _items(source: Source, seed: int, number: int, root: Path) -> Iterator[Item]:
    yield from source.make(random.Random(f"{seed} {source.name}"), number, root)


def make_material(
    out: Path, scale: float = 1.0, seed: int = 1, vocabulary: int | None = 4096, root: Path = Path("/")
) -> list[Made]:
    """Write the material; what was made of each source."""
    if (out / "licences.json").exists():
        raise UserError(f"{out} holds material already; give another --out")
    (out / "images").mkdir(parents=True, exist_ok=True)
    made = []
    with (out / "images.jsonl").open("w") as images, (out / "text.jsonl").open("w") as text:
        for source in SOURCES:
            count, note = 0, ""
            try:
                for item in _items(source, seed, max(1, round(source.number * scale)), root):
                    line = {"id": f"{source.name}/{count}", "question": item.question, "answer": item.answer}
                    line |= {"source": source.name, "licence": source.licence, "origin": item.origin}
                    if item.image is not None:
                        line["image"] = f"{source.name}_{count:06d}.jpg"
                        item.image.save(out / "images" / line["image"], "JPEG", quality=92, subsampling=0)
                    (text if item.image is None else images).write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
            except (ImportError, FileNotFoundError, OSError) as error:
                if count:
                    raise
                note = f"left out, since {source.package} is not installed ({error})"
            made.append(Made(source, count, note))
    qwen2_tokenizer(vocabulary).save(str(out / "tokenizer.json"))
    facts = [
        {"source": one.source.name, "items": one.items, "package": one.source.package, "licence": one.source.licence}
        | {"origin": one.source.origin}
        for one in made
        if one.items
    ]
    (out / "licences.json").write_text(json.dumps(facts, indent=1) + "\n")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_nvlm.demo.material",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--scale", type=positive_float, default=1.0, help="share of the full amount of each source (default 1)")
    add("--seed", type=natural_int, default=1, help="default 1")
    add(
        "--vocabulary",
        type=natural_int,
        default=4096,
        help="base tokens of the tokenizer, 0: all of Qwen2's (default 4096)",
    )
    add("--root", type=Path, default=Path("/"), metavar="DIR", help="where Debian packages are unpacked (default /)")
    add("--shards", action="store_true", help="build shards too")
    add("--tile-size", type=tile_pixels, default=448, help="of the shards (default 448)")
    add("--images", choices=("tiles", "whole"), default="tiles", help="of the shards: cut in advance, or kept whole")
    options = parser.parse_args(arguments)
    try:
        made = make_material(options.out, options.scale, options.seed, options.vocabulary or None, options.root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for one in made:
        print(f"{one.source.name:>14} {one.items:>6} {one.note or one.source.licence}")
    if options.shards:
        common = ["--tokenizer", str(options.out / "tokenizer.json"), "--quiet", "--keep", "licence"]
        common += ["--shard-mb", "16", "--shuffle", str(options.seed)]
        for name in ("images", "text"):
            command = [
                "--out",
                str(options.out / "shards" / name),
                "--jsonl",
                str(options.out / f"{name}.jsonl"),
                *common,
            ]
            if name == "images":
                command += ["--images-dir", str(options.out / "images"), "--tile-size", str(options.tile_size)]
                command += ["--images", options.images]
            build_shards.main(command)


if __name__ == "__main__":
    main()

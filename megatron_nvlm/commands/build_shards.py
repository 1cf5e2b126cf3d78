"""Shards from images and conversations: `python -m tools.build_shards --out DIR --jsonl FILE --tokenizer FILE`.

Input is any number of
  --jsonl FILE       one JSON object a line, or one JSON array of them: `image` (a path or several, relative to
                     --images-dir) and a conversation (`conversations` as LLaVA and ShareGPT have it, or `messages`), or
                     `question` and `answer`, or `caption`; text alone has no image
  --internvl-meta FILE  InternVL's meta file: the `annotation` and `root` of each set that it names
  --table PATH       a .parquet or .arrow file, or a folder of them (Hugging Face datasets): columns are those fields
  --folder DIR       images, each with its caption in a .txt of the same name beside it; linked folders are followed
  --webdataset PATH  tars below a folder, a pattern ('a/*.tar'), braces ('shard-{000..127}.tar') or one tar: samples with a
                     .json of these forms or a .txt caption
--jsonl and tars may be compressed with gzip (.jsonl.gz, .json.gz, .tar.gz, .tgz) or zstd (.jsonl.zst, .tar.zst).

DIR gets shard-*.tar, the index, manifest.json, report.html, report.txt and rejects.jsonl. The same input and settings give
the same bytes, whatever the number of processes. Killed at any moment, the same command goes on; inputs that were rejected
are tried again. A finished set whose inputs were written since is refused: --rebuild begins again.
--preview N writes nothing and shows what the first samples become.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_nvlm.data.building.build import REJECTS_FILE, Builder, BuildSettings
from megatron_nvlm.data.building.forms import DEFAULT_CAPTION_PROMPT
from megatron_nvlm.data.building.inputs import ImageFolder, Input, open_json
from megatron_nvlm.data.building.internvl import describe_meta, read_meta
from megatron_nvlm.data.building.names import Names, read_names
from megatron_nvlm.data.building.preview import Preview
from megatron_nvlm.data.building.report import TrainingPlan, as_html, as_text, histograms, predict, write_report
from megatron_nvlm.data.building.samples import SampleSettings
from megatron_nvlm.data.building.tables import TableRows
from megatron_nvlm.data.building.text import printable
from megatron_nvlm.data.building.webdataset import WebDatasetShards
from megatron_nvlm.data.building.workers import first_interrupt_only
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.shards.index import open_index
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import check_background
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.option_types import (
    batch_size,
    jpeg_quality,
    local_path,
    megabytes,
    named_folder,
    natural_int,
    positive_int,
    process_count,
    share,
    tile_count,
    tile_pixels,
    token_count,
    utf8_text,
)
from megatron_nvlm.text.conversation import DEFAULT_SYSTEM, IMAGE_PLACEHOLDER, find_template
from megatron_nvlm.text.templates import TEMPLATES
from megatron_nvlm.text.tokenizer import Tokenizer


def open_inputs(options: argparse.Namespace, names: Names) -> list[Input]:
    """All inputs, in the order: JSON lines, sets of meta files, tables, folders, WebDataset shards."""
    inputs: list[Input] = [open_json(path, options.images_dir, names) for path in options.jsonl]
    for meta in options.internvl_meta:
        sets = read_meta(meta)
        print(printable(describe_meta(sets)))
        inputs += [open_json(one.annotation, one.root, names) for one in sets]
    inputs += [TableRows(path, options.images_dir, names) for path in options.table]
    inputs += [ImageFolder(path) for path in options.folder]
    inputs += [WebDatasetShards(path, names) for path in options.webdataset]
    if not inputs:
        raise UserError("nothing to build from; give --jsonl, --internvl-meta, --table, --folder or --webdataset")
    return inputs


def sample_settings(options: argparse.Namespace) -> SampleSettings:
    """How samples are stored."""
    check_background(options.background)
    return SampleSettings(
        images=options.images,
        tile_size=options.tile_size,
        max_tiles=options.max_tiles,
        quality=options.quality,
        source=options.source or options.out.name,
        caption_prompt=options.caption_prompt,
        background=options.background,
        keep=tuple(options.keep),
        names=read_names(options.field, options.role, options.placeholder),
    )


def text_counter(options: argparse.Namespace) -> TextTokenCounter | None:
    """What counts text; None without a tokenizer."""
    find_template(options.template)
    if options.tokenizer is None:
        return None
    system = None if options.system.lower() in ("", "none", "null") else options.system
    return TextTokenCounter(Tokenizer.load(options.tokenizer), options.template, system)


def preview(options: argparse.Namespace) -> int:
    """Print what the first samples would become; 1 if there are only rejects."""
    settings = sample_settings(options)
    inputs = open_inputs(options, settings.names)
    shown = Preview(inputs, settings, options.preview, text_counter(options))
    for line in shown.lines():
        print(printable(line))
    return 0 if shown.num_good else 1


def build(options: argparse.Namespace) -> str:
    """Build or go on; returns the report's text."""
    counter = text_counter(options)
    sample = sample_settings(options)
    settings = BuildSettings(
        sample, options.shard_mb, options.samples_per_shard, options.shuffle, options.max_reject_rate
    )
    builder = Builder(open_inputs(options, sample.names), options.out, settings, counter)
    manifest = builder.run(options.processes, not options.quiet, options.rebuild)
    index, tiling = open_index(options.out), TilingConfig(options.tile_size, options.max_tiles, options.tag_format)
    predictions = []
    if counter is not None:
        plan = TrainingPlan(counter.tokenizer, tiling, options.template, options.global_batch, options.sequence_length)
        predictions = predict(index, plan)
    parts = (manifest, histograms(index, tiling), predictions, options.global_batch)
    texts = as_text(*parts), as_html(*parts)
    write_report(options.out, texts)
    return texts[0]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=named_folder, required=True, metavar="DIR", help="folder of the new set")
    add("--jsonl", type=local_path, action="append", default=[], metavar="FILE", help="may be repeated")
    add(
        "--images-dir",
        type=local_path,
        metavar="DIR",
        help="what paths in --jsonl are relative to (default: its folder)",
    )
    add("--internvl-meta", type=local_path, action="append", default=[], metavar="FILE", help="may be repeated")
    add("--table", type=local_path, action="append", default=[], metavar="PATH", help="may be repeated; needs pyarrow")
    add("--folder", type=local_path, action="append", default=[], metavar="DIR", help="may be repeated")
    add("--webdataset", type=local_path, action="append", default=[], metavar="PATH", help="may be repeated")
    _add_storing(add)
    add(
        "--tokenizer",
        type=local_path,
        metavar="FILE",
        help="the run's tokenizer.json: counts tokens, which packing needs",
    )
    add("--template", choices=tuple(TEMPLATES), default="chatml", help="the run's data.template (default chatml)")
    add(
        "--system",
        type=utf8_text,
        default=DEFAULT_SYSTEM,
        help=f"the run's data.system, or none (default {DEFAULT_SYSTEM!r})",
    )
    add("--tag-format", default="1d", help="the run's tiling.tag_format, for the report (default 1d)")
    add("--shard-mb", type=megabytes, default=256, help="size of a shard, about, in megabytes (default 256)")
    add("--samples-per-shard", type=positive_int, help="instead of a size")
    add("--shuffle", type=natural_int, metavar="SEED", help="write samples in the random order of this seed")
    add("--max-reject-rate", type=share, default=0.01, help="share of bad inputs that fails the build (default 0.01)")
    add("--processes", type=process_count, default=os.cpu_count() or 1, help="default: one for each core")
    add("--global-batch", type=batch_size, default=256, help="for the report's steps per epoch (default 256)")
    add(
        "--sequence-length",
        type=token_count,
        help="for the report's packing (default: the paper's)",
    )
    add(
        "--preview",
        type=positive_int,
        metavar="N",
        help="write nothing: show what the first N samples of each input become",
    )
    add("--rebuild", action="store_true", help="remove what a build of --out has written and begin again")
    add("--quiet", action="store_true", help="no progress bar, no report on the terminal")
    return parser


def _add_storing(add: Callable[..., Any]) -> None:
    add(
        "--images",
        choices=("tiles", "whole"),
        default="tiles",
        help="cut in advance (fast to read) or kept as they are",
    )
    add("--tile-size", type=tile_pixels, default=448, help="pixels along an edge of a tile (default 448)")
    add("--max-tiles", type=tile_count, default=6, help="most tiles of an image, without the thumbnail (default 6)")
    add("--quality", type=jpeg_quality, default=90, help="JPEG quality of tiles (default 90)")
    add(
        "--background",
        type=utf8_text,
        metavar="COLOUR",
        help="the run's tiling.background (default: transparency is dropped)",
    )
    add("--caption-prompt", type=utf8_text, default=DEFAULT_CAPTION_PROMPT, help="question of captions")
    add("--source", type=utf8_text, help="name under which training counts bad samples (default: the name of --out)")
    add(
        "--keep",
        type=utf8_text,
        action="append",
        default=[],
        metavar="FIELD",
        help="copy this field of the input, such as a licence",
    )
    _add_names(add)


def _add_names(add: Callable[..., Any]) -> None:
    add(
        "--field",
        type=utf8_text,
        action="append",
        default=[],
        metavar="NAME=THEIRS",
        help="what the input calls a field: image=picture_path, or from=speaker of turns; may be repeated",
    )
    add(
        "--role",
        type=utf8_text,
        action="append",
        default=[],
        metavar="NAME=THEIRS",
        help="what it calls a speaker: user=questioner",
    )
    add(
        "--placeholder",
        type=utf8_text,
        default=IMAGE_PLACEHOLDER,
        help=f"what stands where a picture stands (default {IMAGE_PLACEHOLDER})",
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    with first_interrupt_only():
        _main(make_parser().parse_args(arguments))


def _main(options: argparse.Namespace) -> None:
    try:
        if options.preview is not None:
            sys.exit(preview(options))
        text = build(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}; the same command goes on when that is fixed", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if not options.quiet:
        print(printable(text))
    rejects = sum(1 for _ in (options.out / REJECTS_FILE).open("rb"))
    told = f"; {rejects} inputs rejected, see {REJECTS_FILE}" if rejects else ""
    print(printable(f"{options.out} is built{told}"))


if __name__ == "__main__":
    main()

"""Draws one sample as the model gets it: `python -m tools.inspect_sample --shards DIR --number N --out sample.png`.

Stages: stored (members and conversation), tiles (with their tags), rows (decoder and context, coloured by what is
learned), intervals (what each row sees through cross-attention); for D, X and H. --out ending in .html gives a page.
Settings come from a run file (--config) or from the options.
"""

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_nvlm.data.building import draw
from megatron_nvlm.data.building.lettering import find_missing
from megatron_nvlm.data.prepare import SamplePipeline
from megatron_nvlm.data.shards.read import RawSample, ShardSet
from megatron_nvlm.data.shards.records import describe_images
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.tile_budget import SourceImage, grid_choices
from megatron_nvlm.image.tile_tags import TAG_FORMATS, tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.option_types import local_path, natural_int, tile_count, tile_pixels, token_count, utf8_text
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.conversation import DEFAULT_SYSTEM
from megatron_nvlm.text.templates import TEMPLATES
from megatron_nvlm.text.tokenizer import Tokenizer

STAGES = ("stored", "tiles", "rows", "intervals")


def make_panels(raw: RawSample, pipeline: SamplePipeline, stages: Sequence[str], first: bool) -> list[draw.Panel]:
    """Panels of one variant; what all variants share only if `first`."""
    shared = [draw.draw_stored(raw)] if first and "stored" in stages else []
    try:
        prepared = pipeline.prepare(raw)
    except UserError as error:
        raise UserError(f"the sample {raw.key}: {error}") from error
    if first and "tiles" in stages:
        grids = find_grids(raw, pipeline.tiling, prepared.sequence.num_tiles)
        tags = [tile_tags(grid, pipeline.tiling.tag_format, pipeline.tiling.thumbnail_tag) for grid in grids]
        shared.append(draw.draw_tiles(prepared.tiles, tags, grids))
    name, rows = f"NVLM-{pipeline.variant.name.upper()}", prepared.sequence
    panels = []
    if "rows" in stages:
        used = [
            one for one in ("given", "learned", "vision") if one != "vision" or (rows.decoder_vision_index >= 0).any()
        ]
        cells = draw.token_cells(prepared, pipeline.tokenizer, pipeline.tokens_per_tile)
        targets = int(rows.loss_mask.sum())
        panels.append(draw.draw_cells(f"{name}: {len(rows.tokens)} decoder tokens, {targets} learned", cells, used))
        if len(rows.context_tokens):
            cells = draw.context_cells(prepared, pipeline.tokenizer, pipeline.tokens_per_tile)
            used = ["vision", "tag"] if pipeline.variant.tags_in_context else ["vision"]
            panels.append(draw.draw_cells(f"{name}: {len(rows.context_tokens)} context tokens", cells, used))
    if "intervals" in stages:
        panel = draw.draw_intervals(prepared, pipeline.tokens_per_tile)
        panels.append(draw.Panel(f"{name}: {panel.title}", panel.image))
    return shared + panels


def find_grids(raw: RawSample, tiling: TilingConfig, num_tiles: int) -> list[Grid]:
    """The grids of a sample's images, by the rule for too long samples, which ended at this number of tiles."""
    described = describe_images(raw.record, raw.pictures)
    images = [
        SourceImage(image.width, image.height, Grid(image.cols, image.rows) if image.cols else None)
        for image in described
    ]
    for grids in grid_choices(images, tiling):
        if sum(grid.num_pictures for grid in grids) == num_tiles:
            break
    return grids


def as_html(panels: Sequence[draw.Panel], title: str) -> str:
    """One page, pictures inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"]
    for panel in panels:
        buffer = io.BytesIO()
        panel.image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f"<h2>{html.escape(panel.title)}</h2><img src='data:image/png;base64,{data}'>")
    return "\n".join(parts) + "\n"


def make_pipelines(options: argparse.Namespace) -> list[SamplePipeline]:
    """One for each variant that was asked for."""
    if options.config is not None:
        from megatron_nvlm.config.load import load_run  # imports the model; seconds
        from megatron_nvlm.models.config import resolve_model

        run = load_run(options.config, options.overrides)
        parts = resolve_model(run.model)
        variants = options.variant or [run.model.variant]
        tiling, length, per_tile = run.tiling, run.data.sequence_length, parts.vision.tokens_per_tile
        tokenizer, template, system = Tokenizer.load(run.data.tokenizer), run.data.template, run.data.system
    else:
        if options.tokenizer is None:
            raise UserError("no tokenizer; give --tokenizer or a run file with --config")
        variants = options.variant or ["d", "x", "h"]
        tiling = TilingConfig(options.tile_size, options.max_tiles, options.tag_format)
        length, per_tile = options.sequence_length, (options.tile_size // 28) ** 2
        tokenizer, template = Tokenizer.load(options.tokenizer), options.template
        system = None if options.system.lower() in ("", "none", "null") else options.system
    return [SamplePipeline(tokenizer, tiling, VARIANTS[name], per_tile, length, template, system) for name in variants]


def find_sample(shards: ShardSet, number: int, key: str | None) -> RawSample:
    """Find a sample by number, or by key (which reads samples until it is found)."""
    if key is not None:
        for place in range(len(shards)):
            raw = shards.read(place)
            if key in (raw.key, str(raw.record.get("id", raw.key))):
                return raw
        raise UserError(f"no sample of {shards.folder} has the key or id {key!r}")
    if not 0 <= number < len(shards):
        raise UserError(f"{shards.folder} holds samples 0 to {len(shards) - 1} and --number is {number}")
    return shards.read(number)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="section.key=value of the run file")
    add("--shards", required=True, metavar="DIR", help="a set of shards: a folder, or an address that data.train takes")
    add("--number", type=natural_int, default=0, help="the sample's number in the set (default 0)")
    add("--key", help="its key or the id of its record, instead of a number")
    add("--out", type=Path, required=True, metavar="FILE", help="a .png or .html")
    add("--stage", choices=STAGES, action="append", help="may be repeated; default: all")
    add("--variant", choices=tuple(VARIANTS), action="append", help="may be repeated; default: the run's, or all three")
    add("--config", type=Path, metavar="FILE", help="take all settings below from this run file")
    add("--tokenizer", type=local_path, metavar="FILE", help="a tokenizer.json")
    add("--tile-size", type=tile_pixels, default=448, help="default 448")
    add("--max-tiles", type=tile_count, default=6, help="default 6")
    add("--tag-format", choices=TAG_FORMATS, default="1d", help="default 1d")
    add("--sequence-length", type=token_count, default=3200, help="most decoder tokens (default 3200)")
    add("--template", choices=tuple(TEMPLATES), default="chatml", help="default chatml")
    add("--system", type=utf8_text, default=DEFAULT_SYSTEM, help=f"or none (default {DEFAULT_SYSTEM!r})")
    options = parser.parse_args(arguments)
    try:
        if options.out.suffix not in (".png", ".html"):
            raise UserError(f"--out is {options.out}; its name must end in .png or .html")
        raw = find_sample(ShardSet(options.shards), options.number, options.key)
        stages: Sequence[str] = options.stage or STAGES
        panels: list[draw.Panel] = []
        if set(stages) == {"stored"}:  # needs no tokenizer, and shows samples that cannot be trained on
            panels.append(draw.draw_stored(raw))
        else:
            for number, pipeline in enumerate(make_pipelines(options)):
                panels += make_panels(raw, pipeline, stages, first=number == 0)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.suffix == ".png":
            draw.stack(panels).save(options.out)
        else:
            options.out.write_text(as_html(panels, f"{options.shards} {raw.key}"))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out} shows {raw.key}")
    if missing := find_missing(json.dumps(raw.record, ensure_ascii=False)):
        print(
            f"{len(missing)} characters are drawn as code points, since no font here has them; install one that does "
            "(Debian: apt-get install fonts-unifont)"
        )


if __name__ == "__main__":
    main()

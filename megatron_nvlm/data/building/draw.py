"""Pictures of one sample at each stage: what is stored, its tiles with their tags, its tokens, what each of them sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from megatron_nvlm.data.building.lettering import text_width, write_text
from megatron_nvlm.data.prepare import PreparedSample
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.errors import UserError
from megatron_nvlm.image.pixels import read_header
from megatron_nvlm.text.tokenizer import Tokenizer

WIDTH = 1200
MARGIN = 16
INK, PALE, LINE = (30, 30, 30), (120, 120, 120), (205, 205, 205)
COLOURS = {"given": (235, 235, 235), "learned": (176, 224, 176), "vision": (188, 208, 240), "tag": (250, 226, 170)}
_NAMES = {
    "given": "given",
    "learned": "learned (its loss counts)",
    "vision": "vision tokens",
    "tag": "tag in the context",
}


@dataclass(frozen=True)
class Panel:
    """A titled picture."""

    title: str
    image: Image.Image


def stack(panels: Sequence[Panel]) -> Image.Image:
    """All panels one below the other."""
    heights = [panel.image.height + 44 for panel in panels]
    page = Image.new("RGB", (WIDTH, sum(heights) + MARGIN), "white")
    draw, top = ImageDraw.Draw(page), 0
    for panel, height in zip(panels, heights, strict=True):
        write_text(draw, (MARGIN, top + 12), panel.title, INK, 18)
        page.paste(panel.image, (0, top + 40))
        top += height
    return page


def draw_stored(raw: RawSample) -> Panel:
    """Names and sizes of the members, and the conversation."""
    lines = [f"{raw.key}.json"]
    for name, data in raw.pictures.items():
        try:
            header = read_header(data)
            seen = f"{header.width}x{header.height} {header.format} {header.mode}"
        except UserError as error:
            seen = str(error)
        lines += _wrap(f"{raw.key}.{name}   {len(data)} bytes, {seen}", 150)
    rest = {name: value for name, value in raw.record.items() if name != "conversation"}
    lines += ["", *_wrap(str(rest), 150), ""]
    for turn in raw.record.get("conversation", raw.record.get("conversations", [])):
        said = f"{turn.get('from', turn.get('role'))}: {turn.get('value', turn.get('content'))}"
        lines += [wrapped for line in said.splitlines() for wrapped in _wrap(line, 150)]
    return Panel("stored", _text_image(lines))


def _wrap(text: str, width: int) -> list[str]:
    return [text[start : start + width] for start in range(0, len(text), width)] or [""]


def _text_image(lines: Sequence[str]) -> Image.Image:
    image = Image.new("RGB", (WIDTH, 20 * len(lines) + 8), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        write_text(draw, (MARGIN, 20 * number), line, INK, 14)
    return image


def draw_tiles(tiles: np.ndarray, tags: Sequence[Sequence[str]], grids: Sequence[tuple[int, int]]) -> Panel:
    """Each image's tiles as they lie, the thumbnail beside them.

    Args:
        tiles: uint8 [tiles, 3, S, S] of all images.
        tags: of each image, one a tile.
    """
    if not grids:
        return Panel("tiles: none, text only", Image.new("RGB", (WIDTH, 1), "white"))
    drawn, first = [], 0
    for image_tags, (cols, rows) in zip(tags, grids, strict=True):
        drawn.append(_draw_image(tiles[first : first + len(image_tags)], image_tags, cols, rows))
        first += len(image_tags)
    whole = Image.new("RGB", (WIDTH, sum(image.height for image in drawn)), "white")
    top = 0
    for image in drawn:
        whole.paste(image, (0, top))
        top += image.height
    return Panel("tiles with their tags", whole)


def _draw_image(tiles: np.ndarray, tags: Sequence[str], cols: int, rows: int) -> Image.Image:
    columns = cols + 1 if len(tags) > 1 else 1
    edge = min(224, (WIDTH - MARGIN) // columns - MARGIN)
    step, label = edge + MARGIN, 24
    image = Image.new("RGB", (WIDTH, rows * (step + label) + 4), "white")
    draw = ImageDraw.Draw(image)
    for number, (tile, tag) in enumerate(zip(tiles, tags, strict=True)):
        is_last = number == len(tags) - 1
        col, row = (columns - 1, 0) if is_last else (number % cols, number // cols)
        left, top = MARGIN + col * step, row * (step + label)
        picture = Image.fromarray(tile.transpose(1, 2, 0)).resize((edge, edge), Image.Resampling.BICUBIC)
        image.paste(picture, (left, top))
        draw.rectangle((left - 1, top - 1, left + edge, top + edge), outline=PALE)
        label_text = (tag or "(no tag)") + (" (thumbnail)" if is_last else "")
        write_text(draw, (left, top + edge + 3), label_text, INK, 13)
    return image


@dataclass(frozen=True)
class Cell:
    """A token, or a run of vision tokens."""

    text: str
    colour: str


def _show(text: str) -> str:
    return text.replace("\n", "\\n").replace(" ", "·") or "?"


def token_cells(prepared: PreparedSample, tokenizer: Tokenizer, tokens_per_tile: int) -> list[Cell]:
    """Tokens of the decoder; one is learned if the loss of the token before it counts."""
    sequence = prepared.sequence
    learned = np.append(False, sequence.loss_mask[:-1] > 0)
    return _cells(sequence.tokens, sequence.decoder_vision_index, learned, tokenizer, tokens_per_tile, "given")


def context_cells(prepared: PreparedSample, tokenizer: Tokenizer, tokens_per_tile: int) -> list[Cell]:
    """Tokens of the context."""
    sequence = prepared.sequence
    nothing = np.zeros(len(sequence.context_tokens), dtype=bool)
    return _cells(sequence.context_tokens, sequence.context_vision_index, nothing, tokenizer, tokens_per_tile, "tag")


def _cells(
    tokens: np.ndarray, vision: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer, per_tile: int, other: str
) -> list[Cell]:
    cells, place = [], 0
    while place < len(tokens):
        if vision[place] >= 0:
            tile, start = int(vision[place]) // per_tile, place
            while place < len(tokens) and vision[place] >= 0 and int(vision[place]) // per_tile == tile:
                place += 1
            cells.append(Cell(f"tile {tile + 1}: {place - start} vision tokens", "vision"))
            continue
        cells.append(Cell(_show(tokenizer.token_text(int(tokens[place]))), "learned" if learned[place] else other))
        place += 1
    return cells


def draw_cells(title: str, cells: Sequence[Cell], used: Sequence[str]) -> Panel:
    """Cells in lines, coloured by what they are, with a legend."""
    line_height = 26
    places, left, line = [], MARGIN, 1
    for cell in cells:
        width = int(text_width(cell.text, 14)) + 9
        if left + width > WIDTH - MARGIN:
            left, line = MARGIN, line + 1
        places.append((left, line * line_height + 6, width))
        left += width + 2
    image = Image.new("RGB", (WIDTH, (line + 1) * line_height + 12), "white")
    draw, left = ImageDraw.Draw(image), MARGIN
    for name in used:
        draw.rectangle((left, 4, left + 14, 18), fill=COLOURS[name], outline=LINE)
        write_text(draw, (left + 20, 3), _NAMES[name], PALE, 13)
        left += 40 + int(text_width(_NAMES[name], 13))
    for cell, (x, y, width) in zip(cells, places, strict=True):
        draw.rectangle((x, y, x + width, y + line_height - 4), fill=COLOURS[cell.colour], outline=LINE)
        write_text(draw, (x + 4, y + 3), cell.text, INK, 14)
    return Panel(title, image)


def draw_intervals(prepared: PreparedSample, tokens_per_tile: int) -> Panel:
    """Decoder tokens from top to bottom, context tokens from left to right; dark where a token sees."""
    sequence = prepared.sequence
    decoder, context = len(sequence.tokens), len(sequence.context_tokens)
    if context == 0:
        return Panel(
            f"what each of {decoder} decoder tokens sees in the context: there is none",
            Image.new("RGB", (WIDTH, 1), "white"),
        )
    seen = np.zeros((decoder, context), dtype=np.uint8)
    for row, (start, end) in enumerate(sequence.context_intervals.tolist()):
        seen[row, start:end] = 1
    learned, image_tokens = np.append(False, sequence.loss_mask[:-1] > 0), sequence.decoder_vision_index >= 0
    palette = np.array([(250, 250, 250), (60, 100, 170)], dtype=np.uint8)
    picture = palette[seen]
    # Along the left side what each row is, along the top what each context token is.
    side = np.tile(np.array(COLOURS["given"], dtype=np.uint8), (decoder, 1))
    side[learned], side[image_tokens] = COLOURS["learned"], COLOURS["vision"]
    top = np.where((sequence.context_vision_index >= 0)[:, None], COLOURS["vision"], COLOURS["tag"]).astype(np.uint8)
    tile = sequence.context_vision_index // tokens_per_tile
    top[(sequence.context_vision_index >= 0) & (tile % 2 == 1)] = (150, 178, 222)
    scale_x = min(16.0, (WIDTH - 4 * MARGIN) / context)
    scale_y = min(16.0, max(700 / decoder, 1.0))
    size = (max(1, round(context * scale_x)), max(1, round(decoder * scale_y)))
    image = Image.new("RGB", (WIDTH, size[1] + 30), "white")
    left, above = 2 * MARGIN + 6, 20
    image.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (left, above))
    image.paste(Image.fromarray(side[:, None]).resize((14, size[1]), Image.Resampling.NEAREST), (left - 18, above))
    image.paste(Image.fromarray(top[None]).resize((size[0], 14), Image.Resampling.NEAREST), (left, above - 18))
    ImageDraw.Draw(image).rectangle((left - 1, above - 1, left + size[0], above + size[1]), outline=PALE)
    return Panel(f"what each of {decoder} decoder tokens (down) sees of {context} context tokens (across)", image)

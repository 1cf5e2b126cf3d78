"""Conversations to rows, stated a second time and independently of the package: tests compare the two.

The template is a dictionary as Template.content gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from megatron_nvlm.text.tokenizer import Tokenizer

Grid = tuple[int, int]
"""Columns and rows of tiles."""

IMAGE = "<image>"
"""Where an image stands in the text of a user's turn; in other turns it is text."""
BOX_SCALE = 1000
Turn = tuple[str, str]
"""Role (system, user or assistant) and text."""


def split_turn(turn: Turn) -> list[str]:
    """The text around the images of a turn; of the user alone, since what the model writes is text."""
    role, text = turn
    return text.split(IMAGE) if role == "user" else [text]


def count_places(turns: Sequence[Turn]) -> int:
    """Places of images in a conversation."""
    return sum(len(split_turn(turn)) - 1 for turn in turns)


@dataclass
class Rows:
    """A sample's rows as they grow; numbers count within the sample."""

    ids: list[int] = field(default_factory=list)
    vision_index: list[int] = field(default_factory=list)
    """Number of the vision token that stands here; -1 for text."""
    intervals: list[tuple[int, int]] = field(default_factory=list)
    """Range of context rows that a row sees."""
    context_ids: list[int] = field(default_factory=list)
    context_index: list[int] = field(default_factory=list)
    num_tiles: int = 0

    def add_text(self, ids: Sequence[int], sees: tuple[int, int] | None = None) -> None:
        """Rows of text; they see all of the context so far unless `sees` says otherwise."""
        self._add(ids, [-1] * len(ids), sees)

    def add_vision(self, numbers: Sequence[int]) -> None:
        """Rows of vision tokens in the decoder; they see all of the context so far."""
        self._add([0] * len(numbers), numbers, None)

    def add_context(self, tag: Sequence[int], numbers: Sequence[int]) -> tuple[int, int]:
        """A tile in the context, after its tag; returns the range of the tile's own rows."""
        self.context_ids += [*tag, *[0] * len(numbers)]
        self.context_index += [*[-1] * len(tag), *numbers]
        return len(self.context_ids) - len(numbers), len(self.context_ids)

    def _add(self, ids: Sequence[int], numbers: Sequence[int], sees: tuple[int, int] | None) -> None:
        self.ids += ids
        self.vision_index += numbers
        self.intervals += [sees or (0, len(self.context_ids))] * len(ids)


def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> Grid:
    """The grid of at most `max_tiles` tiles whose aspect ratio is closest to the image's.

    Among equals a larger grid replaces a smaller one only if the image has more than half of its pixels.
    """
    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    best, least = (1, 1), float("inf")
    for cols, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        difference = abs(width / height - cols / rows)
        is_filled = width * height > 0.5 * tile_size * tile_size * cols * rows
        if difference < least or (difference == least and is_filled):
            best, least = (cols, rows), difference
    return best


def cut_tiles(image: Image.Image, grid: Grid, tile_size: int) -> list[Image.Image]:
    """Tiles row by row, then the thumbnail if there is more than one; bicubic, aspect ratio not kept."""
    cols, rows = grid
    canvas = image.resize((cols * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    corners = [(col * tile_size, row * tile_size) for row in range(rows) for col in range(cols)]
    tiles = [canvas.crop((left, top, left + tile_size, top + tile_size)) for left, top in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def tile_tags(grid: Grid, tag_format: str, thumbnail_tag: str) -> list[str]:
    """One tag per tile, row by row, the thumbnail's last; an image of one tile has the thumbnail's alone."""
    cols, rows = grid
    last = "" if tag_format == "none" else thumbnail_tag
    if cols * rows == 1:
        return [last]
    places = [(col, row) for row in range(rows) for col in range(cols)]
    return [*(_tag(grid, col, row, tag_format) for col, row in places), last]


def _tag(grid: Grid, col: int, row: int, tag_format: str) -> str:
    cols, rows = grid
    if tag_format == "none":
        return ""
    if tag_format == "1d":
        return f"<tile_{row * cols + col + 1}>"
    if tag_format == "2d_grid":
        return f"<tile_x{col}_y{row}>"
    if tag_format == "2d_box":
        left, right = (round(BOX_SCALE * edge / cols) for edge in (col, col + 1))
        top, bottom = (round(BOX_SCALE * edge / rows) for edge in (row, row + 1))
        return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"
    raise ValueError(f"tag_format is {tag_format!r}; it must be none, 1d, 2d_grid or 2d_box")


@dataclass(frozen=True)
class Layout:
    """How conversations with images become rows.

    Args:
        variant: d, x or h.
        template: as above.
        tag_format, thumbnail_tag: of `tile_tags`.
        tokens_per_tile: vision tokens of a tile.
    """

    variant: str
    template: dict[str, Any]
    tag_format: str
    thumbnail_tag: str
    tokens_per_tile: int

    def rows(self, turns: Sequence[Turn], grids: Sequence[Grid], tokenizer: Tokenizer, open_answer: bool) -> Rows:
        """Rows of a conversation.

        Args:
            grids: of the images, in the order of their places in the text.
            open_answer: end with the start of an assistant's turn, for the model to write on.

        Raises:
            ValueError: places and images differ in number.
        """
        places = count_places(turns)
        if places != len(grids):
            raise ValueError(f"a conversation has {places} {IMAGE} for {len(grids)} images; name each image once")
        form, rows, images = self.template, Rows(), iter(grids)
        rows.add_text(_special(tokenizer, form["begin"]))
        for role, text in turns:
            speech = form["roles"][role]
            rows.add_text(_special(tokenizer, speech["start"]))
            before = speech["header"]
            if role == "assistant":  # training tokenises what the model writes apart from the header
                rows.add_text(tokenizer.encode(before))
                before = ""
            *parts, last = split_turn((role, text))
            for part in parts:
                self._add_image(rows, before + part + form["before_image"], next(images), tokenizer)
                before = form["after_image"]
            rows.add_text(tokenizer.encode(before + last))
            rows.add_text(_special(tokenizer, speech["end"]))
            rows.add_text(tokenizer.encode(speech["behind"]))
        if open_answer:
            speech = form["roles"]["assistant"]
            rows.add_text(_special(tokenizer, speech["start"]))
            rows.add_text(tokenizer.encode(speech["header"]))
        return rows

    def _add_image(self, rows: Rows, before: str, grid: Grid, tokenizer: Tokenizer) -> None:
        """The text before an image, its tags and its vision tokens."""
        spelled = tile_tags(grid, self.tag_format, self.thumbnail_tag)
        tags = [tokenizer.encode(tag) for tag in spelled]
        ids = tokenizer.encode(before)
        if self.template["joins_first_tag"]:
            first = len(tags) - 1 if self.variant == "h" else 0  # the first that stands in the decoder
            ids = tokenizer.encode_joined(before, spelled[first])[0]
            tags[first] = tokenizer.encode_joined(self.template["before_image"], spelled[first])[1]
        rows.add_text(ids)
        first_number = rows.num_tiles * self.tokens_per_tile
        rows.num_tiles += len(tags)
        for tile, tag in enumerate(tags):
            start = first_number + tile * self.tokens_per_tile
            numbers = range(start, start + self.tokens_per_tile)
            if self.variant == "x":
                rows.add_text(tag, sees=rows.add_context([], numbers))
            elif self.variant == "h" and tile < len(tags) - 1:
                rows.add_context(tag, numbers)
            else:
                rows.add_text(tag)
                rows.add_vision(numbers)


def _special(tokenizer: Tokenizer, name: str) -> list[int]:
    return [tokenizer.special_id(name)] if name else []

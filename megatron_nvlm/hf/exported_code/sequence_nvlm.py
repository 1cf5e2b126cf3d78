"""Conversations to rows, token for token those of training: templates, tile tags, and where each vision token goes.

The template is data, from processor_config.json: `begin`, `before_image`, `after_image`, `takes_system`,
`joins_first_tag`, and for each role `start`, `header`, `end`, `behind` (start and end are special tokens).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .image_processing_nvlm import Grid

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
        """A tile in the context, behind its tag; returns the range of the tile's own rows."""
        self.context_ids += [*tag, *[0] * len(numbers)]
        self.context_index += [*[-1] * len(tag), *numbers]
        return len(self.context_ids) - len(numbers), len(self.context_ids)

    def _add(self, ids: Sequence[int], numbers: Sequence[int], sees: tuple[int, int] | None) -> None:
        self.ids += ids
        self.vision_index += numbers
        self.intervals += [sees or (0, len(self.context_ids))] * len(ids)


class Encoder:
    """Text to ids. Text is only ever text: what spells a special token in it stays text."""

    def __init__(self, backend: Any) -> None:
        self._fast = copy.deepcopy(backend)
        self._fast.no_padding()
        self._fast.no_truncation()
        if getattr(self._fast.model, "dropout", None) is not None:
            self._fast.model.dropout = None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added."""
        return self._encoded(text).ids

    def encode_joined(self, left: str, right: str) -> tuple[list[int], list[int]]:
        """Ids of `left + right` as one text, parted where `right` begins; a token that spans both is the left's."""
        encoded = self._encoded(left + right)
        of_left = sum(start < len(left) for start, _ in encoded.offsets)
        return encoded.ids[:of_left], encoded.ids[of_left:]

    def special(self, name: str) -> list[int]:
        """The id of a special token; none for an empty name."""
        if not name:
            return []
        found = self._fast.token_to_id(name)
        if found is None:
            raise ValueError(f"the tokenizer has no special token {name}, which the template needs")
        return [found]

    def _encoded(self, text: str) -> Any:
        self._fast.encode_special_tokens = True  # each time: a copy of the tokenizer forgets it
        return self._fast.encode(text, add_special_tokens=False)


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

    def rows(self, turns: Sequence[Turn], grids: Sequence[Grid], encoder: Encoder, open_answer: bool) -> Rows:
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
        rows.add_text(encoder.special(form["begin"]))
        for role, text in turns:
            speech = form["roles"][role]
            rows.add_text(encoder.special(speech["start"]))
            before = speech["header"]
            if role == "assistant":  # training tokenises what the model writes apart from the header
                rows.add_text(encoder.encode(before))
                before = ""
            *parts, last = split_turn((role, text))
            for part in parts:
                self._add_image(rows, before + part + form["before_image"], next(images), encoder)
                before = form["after_image"]
            rows.add_text(encoder.encode(before + last))
            rows.add_text(encoder.special(speech["end"]))
            rows.add_text(encoder.encode(speech["behind"]))
        if open_answer:
            speech = form["roles"]["assistant"]
            rows.add_text(encoder.special(speech["start"]))
            rows.add_text(encoder.encode(speech["header"]))
        return rows

    def _add_image(self, rows: Rows, before: str, grid: Grid, encoder: Encoder) -> None:
        """The text before an image, its tags and its vision tokens."""
        spelled = tile_tags(grid, self.tag_format, self.thumbnail_tag)
        tags = [encoder.encode(tag) for tag in spelled]
        ids = encoder.encode(before)
        if self.template["joins_first_tag"]:
            first = len(tags) - 1 if self.variant == "h" else 0  # the first that stands in the decoder
            ids = encoder.encode_joined(before, spelled[first])[0]
            tags[first] = encoder.encode_joined(self.template["before_image"], spelled[first])[1]
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

    def spell(self, turns: Sequence[Turn], open_answer: bool) -> str:
        """The conversation as text, `<image>` where an image goes: to be looked at, or for `read`."""
        form = self.template
        parts = [form["begin"]]
        for role, text in turns:
            speech = form["roles"][role]
            parts += [speech["start"], speech["header"], text, speech["end"], speech["behind"]]
        if open_answer:
            parts += [form["roles"]["assistant"]["start"], form["roles"]["assistant"]["header"]]
        return "".join(parts)

    def read(self, text: str) -> tuple[list[Turn], bool] | None:
        """What `spell` wrote, taken apart: (turns, whether an answer is open); None for a text without turn marks.

        Raises:
            ValueError: the text begins as a spelled conversation and does not go on as one.
        """
        roles = self.template["roles"]
        marks = {role: speech["start"] + speech["header"] for role, speech in roles.items() if speech["start"]}
        text = text.removeprefix(self.template["begin"])
        if not any(text.startswith(mark) for mark in marks.values()):
            return None
        turns: list[Turn] = []
        while text:
            role = next((role for role, mark in marks.items() if text.startswith(mark)), None)
            if role is None:
                raise ValueError(f"a prompt goes on with {text[:40]!r} where the template has a turn; give the turns")
            text = text.removeprefix(marks[role])
            if role == "assistant" and not text:
                return turns, True
            said, end, text = text.partition(roles[role]["end"] + roles[role]["behind"])
            if not end:
                raise ValueError(f"a prompt's last turn, of the {role}, has no end; give the turns")
            turns.append((role, said))
        return turns, False

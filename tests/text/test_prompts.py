"""Prompts equal those that the release's own code makes (tests/reference/chat_prompts.json), id by id."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.image.tile_tags import tile_tags
from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.assemble import assemble
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.conversation import TextPiece, Turn, encode_conversation, find_template
from megatron_nvlm.text.tokenizer import Tokenizer

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "chat_prompts.json").read_text())
GRIDS = {0: [], 1: [Grid(1, 1)], 3: [Grid(2, 1)], 7: [Grid(3, 2)]}
VISION_PAD = 151654


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(qwen2_tokenizer())


def rows_of(
    turns: list[Turn],
    grids: list[Grid],
    tokenizer: Tokenizer,
    template: str,
    variant: str = "d",
    tokens_per_tile: int = 256,
) -> Any:
    """Decoder tokens of a prompt, as training makes them."""
    tags = [encode_tags(grid, TilingConfig(), VARIANTS[variant], tokenizer, find_template(template)) for grid in grids]
    pieces = encode_conversation(
        turns,
        len(grids),
        tokenizer,
        find_template(template),
        open_answer=turns[-1].role == "user" and template != "plain",
        first_tags=[tag.first_in_decoder for tag in tags],
    )
    return assemble(pieces, [lay_out_image(tag.ids, VARIANTS[variant], tokens_per_tile) for tag in tags])


def with_pads(rows: Any) -> list[int]:
    """The ids, with the release's placeholder where a vision token stands."""
    ids = zip(rows.tokens.tolist(), rows.decoder_vision_index.tolist(), strict=True)
    return [VISION_PAD if vision >= 0 else token for token, vision in ids]


@pytest.mark.parametrize("prompt", REFERENCE["prompts"], ids=lambda prompt: prompt["name"])
def test_equals_the_release(tokenizer: Tokenizer, prompt: dict[str, Any]) -> None:
    template = "chatml_hf" if prompt["function"] == "chat" else "plain"
    rows = rows_of([Turn("user", prompt["question"])], GRIDS[prompt["pixel_values_tiles"]], tokenizer, template)
    assert with_pads(rows) == [token for token, count in prompt["ids_rle"] for _ in range(count)]
    assert len(rows.tokens) == prompt["n_tokens"]
    assert int((rows.decoder_vision_index >= 0).sum()) == prompt["n_image_tokens"]


def test_tags_and_wrapper_alone_equal_the_release(tokenizer: Tokenizer) -> None:
    table = REFERENCE["tags_tokenised_alone"]
    assert len(table) > 10
    for text, expected in table.items():
        if "<image>" not in text:
            assert tokenizer.encode(text) == expected["ids"], text
    for grid in (Grid(1, 1), Grid(2, 1), Grid(3, 2), Grid(4, 3)):
        for tag, ids in zip(
            tile_tags(grid, "1d", "<tile_global_thumbnail>"),
            encode_tags(grid, TilingConfig(), VARIANTS["d"], tokenizer, find_template("chatml")).ids,
            strict=True,
        ):
            assert ids == table[tag]["ids"]


def test_special_ids_equal_qwens(tokenizer: Tokenizer) -> None:
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.special_id(name) == REFERENCE["special_ids"][name]


def test_megatrons_spelling_keeps_tags_apart_and_adds_newlines(tokenizer: Tokenizer) -> None:
    """The two spellings side by side: the wrapper's end, the first tag's beginning, the newline after each turn."""
    turns = [Turn("user", "<image>\nPlease describe the image shortly.")]
    megatron = with_pads(rows_of(turns, [Grid(2, 1)], tokenizer, "chatml"))
    release = with_pads(rows_of(turns, [Grid(2, 1)], tokenizer, "chatml_hf"))
    newline, apart, joined = tokenizer.encode("\n"), tokenizer.encode("<Image>"), [46465, 1784, 21094]
    assert newline == [198] and apart == [46465, 29]
    place = megatron.index(46465)
    assert megatron[place : place + 4] == [46465, 29, 27, 21094] and joined == release[release.index(46465) :][:3]
    assert [megatron[i + 1] for i, token in enumerate(megatron) if token == 151645] == [198, 198]
    assert len(megatron) == len(release) + 1 + 2


TALK = [
    Turn("system", "Be brief."),
    Turn("user", "First <image> then <image>: which?"),
    Turn("assistant", "The second."),
    Turn("user", "Why?"),
    Turn("assistant", "It is red."),
]


@pytest.mark.parametrize(
    ("template", "spelled", "targets"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFirst <Image>@</Image> then <Image>@</Image>: which?"
            "<|im_end|>\n<|im_start|>assistant\nThe second.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nIt is red.<|im_end|>\n",
            ["The second.<|im_end|>\n", "It is red.<|im_end|>\n"],
        ),
        (
            "chatml_end_only",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFirst <Image>@</Image> then <Image>@</Image>: which?"
            "<|im_end|>\n<|im_start|>assistant\nThe second.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nIt is red.<|im_end|>\n",
            ["The second.<|im_end|>", "It is red.<|im_end|>"],
        ),
        (
            "chatml_hf",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nFirst <Image>@</Image> then <Image>@</Image>: which?"
            "<|im_end|><|im_start|>assistant\nThe second.<|im_end|><|im_start|>user\nWhy?<|im_end|>"
            "<|im_start|>assistant\nIt is red.<|im_end|>",
            ["The second.<|im_end|>", "It is red.<|im_end|>"],
        ),
        (
            "pretrain",
            "Be brief.\nFirst <Image>@</Image> then <Image>@</Image>: which?\nThe second.<|im_end|>Why?\n"
            "It is red.<|im_end|>",
            ["The second.<|im_end|>", "It is red.<|im_end|>"],
        ),
        (
            "plain",
            "Be brief.First <Image>@</Image> then <Image>@</Image>: which?The second.<|im_end|>Why?It is red.<|im_end|>",
            ["The second.<|im_end|>", "It is red.<|im_end|>"],
        ),
    ],
)
def test_several_turns_and_images(tokenizer: Tokenizer, template: str, spelled: str, targets: list[str]) -> None:
    """What is written, where the images stand, and that exactly the answers and their ends are learned."""
    names = {tokenizer.special_id(name): name for name in ("<|im_start|>", "<|im_end|>")}

    def spell(ids: list[int]) -> str:
        return "".join(names.get(token) or tokenizer.decode([token]) for token in ids)

    # The tag-less form shows the text itself; joined tags are compared with the release above.
    pieces = encode_conversation(TALK, 2, tokenizer, find_template(template), first_tags=["", ""])
    assert "".join(spell(piece.ids) if isinstance(piece, TextPiece) else "@" for piece in pieces) == spelled
    runs: list[str] = []
    previous = False
    for piece in pieces:
        learned = isinstance(piece, TextPiece) and piece.is_target
        if learned and isinstance(piece, TextPiece):
            runs = [*runs[:-1], runs[-1] + spell(piece.ids)] if previous else [*runs, spell(piece.ids)]
        previous = learned
    assert runs == targets


def test_a_system_turn_is_added_once_and_only_where_the_template_has_one(tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "Hello")]

    def text(template: str, system: str | None) -> str:
        pieces = encode_conversation(turns, 0, tokenizer, find_template(template), system)
        return tokenizer.decode([token for piece in pieces if isinstance(piece, TextPiece) for token in piece.ids])

    assert text("chatml", "Be kind.") == "system\nBe kind.\nuser\nHello\n"
    assert text("chatml", None) == "user\nHello\n"
    assert text("pretrain", "Be kind.") == "Hello\n"
    assert text("plain", "Be kind.") == "Hello"


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    for template in ("chatml", "chatml_hf", "pretrain"):
        pieces = encode_conversation([Turn("user", "say <|im_end|> now")], 0, tokenizer, find_template(template), None)
        ids = [token for piece in pieces if isinstance(piece, TextPiece) for token in piece.ids]
        assert ids.count(tokenizer.special_id("<|im_end|>")) == (template != "pretrain")


@pytest.mark.parametrize("tag_format", ["none", "1d", "2d_grid", "2d_box"])
@pytest.mark.parametrize("template", ["chatml", "chatml_hf", "pretrain"])
def test_lengths_do_not_need_the_tags(tokenizer: Tokenizer, template: str, tag_format: str) -> None:
    """The index counts text without knowing tags: their number of tokens is the layout's affair."""
    tiling = TilingConfig(tag_format=tag_format)
    for variant in VARIANTS.values():
        tags = [
            encode_tags(grid, tiling, variant, tokenizer, find_template(template)) for grid in (Grid(3, 2), Grid(1, 1))
        ]
        first = [tag.first_in_decoder for tag in tags]
        with_tags = encode_conversation(TALK, 2, tokenizer, find_template(template), first_tags=first)
        without = encode_conversation(TALK, 2, tokenizer, find_template(template))
        lengths = [[len(p.ids) for p in pieces if isinstance(p, TextPiece)] for pieces in (with_tags, without)]
        assert lengths[0] == lengths[1]
        joined = sum(len(ids) for tag in tags for ids in tag.ids)
        apart = sum(
            len(ids)
            for grid in (Grid(3, 2), Grid(1, 1))
            for ids in encode_tags(grid, tiling, variant, tokenizer, find_template("chatml")).ids
        )
        assert apart - joined == (2 if template == "chatml_hf" and tag_format != "none" else 0)

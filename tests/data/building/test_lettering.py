"""Text is drawn in whatever font has its characters, and what none has as code points."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from megatron_nvlm.data.building import lettering
from megatron_nvlm.data.building.lettering import find_missing, text_width, write_text

CHARACTER = "\u56fe"


def square_font(path: Path, *characters: str) -> None:
    """A font that draws each of these characters as a large square and what it has not as nothing."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(100, 0), (100, 900), (900, 900), (900, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (300, 0), "square": (1000, 100)})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(str(path))


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder in which fonts are looked for."""
    monkeypatch.setattr(lettering, "FOLDERS", (tmp_path,))
    caches = (lettering.faces, lettering._font_files, lettering._find_face)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def draw(text: str) -> bytes:
    image = Image.new("L", (200, 30), 255)
    write_text(ImageDraw.Draw(image), (0, 0), text, 0, 14)  # type: ignore[arg-type]
    return image.tobytes()


def test_a_character_is_drawn_in_the_font_that_has_it(fonts: Path) -> None:
    (fonts / "deep").mkdir()
    square_font(fonts / "deep" / "unifont.ttf", CHARACTER)
    assert find_missing(f"a{CHARACTER} \u72d7") == {"\u72d7"}
    assert draw(CHARACTER).count(0) > 60  # a square of pixels
    assert text_width(f"a{CHARACTER}b", 14) == pytest.approx(text_width("ab", 14) + 14, abs=1)


def test_what_no_font_has_is_a_code_point(fonts: Path) -> None:
    assert find_missing(f"what {CHARACTER}?") == {CHARACTER}
    assert draw(f"a{CHARACTER}b") == draw("aU+56FEb") != draw("ab")


def test_latin_needs_no_font_and_a_broken_one_is_passed_over(fonts: Path) -> None:
    (fonts / "DejaVuSans.ttf").write_bytes(b"no font")
    assert find_missing("It is \u00fc\u00e9\t\n") == set()
    assert draw("plain") != draw("plein")

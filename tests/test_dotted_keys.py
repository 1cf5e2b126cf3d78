"""Settings of nested sections under one name each."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.dotted_keys import dotted_keys, in_words

NAMES = st.text("abc_", min_size=1)
SECTIONS = st.recursive(
    st.none() | st.integers() | st.lists(st.integers()), lambda inner: st.dictionaries(NAMES, inner, min_size=1)
)


def nest(keys: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, name = key.split(".")
        section = nested
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return nested


@given(st.dictionaries(NAMES, SECTIONS))
def test_nested_again_they_are_the_sections(sections: dict[str, Any]) -> None:
    assert nest(dict(dotted_keys(sections))) == sections


def test_sections_without_keys_have_no_names() -> None:
    assert list(dotted_keys({"data": {}, "model": {"variant": "h", "lora": {}}})) == [("model.variant", "h")]
    assert in_words(None) == "null" and in_words(1.5) == "1.5"

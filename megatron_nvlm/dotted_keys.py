"""Settings of nested sections under one name each: `optimizer.max_lr`, as overrides name them."""

from collections.abc import Iterator, Mapping
from typing import Any


def dotted_keys(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of whatever is no section; sections without keys have none.

    Args:
        before: what the names begin with, its dot included.
    """
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def in_words(value: Any) -> str:
    """A setting as run files write it."""
    return "null" if value is None else str(value)

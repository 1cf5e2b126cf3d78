"""Small changes of valid files, each a function of a seed: of bytes, and of JSON by its structure."""

import copy
import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, 10**30, -(10**30), float("nan"), float("inf")),
    *("", "x", "0", "\x00", "é" * 40, "\ud800", "<image>", "../../etc/passwd", "/dev/zero", "https://a.org/b.png"),
    *([], [None], [[]], ["x"], [0], {}, {"x": None}, {"": ""}, {"type": "image"}, {"path": 3}),
)


def mutate_bytes(data: bytes, seed: int) -> bytes:
    """A few bytes replaced, left out, put in or repeated, or the end cut off."""
    chance, changed = random.Random(seed), bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(changed)) if changed else 0
        length = chance.choice((1, 1, 4, 40))
        kind = chance.randrange(6)
        if kind == 0:
            changed[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = chance.randbytes(length)
        elif kind == 3:
            other = chance.randrange(len(changed)) if changed else 0
            changed[place:place] = changed[other : other + length]
        elif kind == 4:
            changed[place : place + length] = chance.choice((b"\x00", b"\xff", b" ")) * length
        elif chance.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def mutate_json(content: Any, seed: int) -> Any:
    """The content with some of its values, keys or entries changed."""
    chance, changed = random.Random(seed), copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        inner = [node for node in _nodes(changed) if node]
        if not inner:
            return chance.choice(ODD_VALUES)
        node = chance.choice(inner)
        key: Any = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        kind = chance.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[chance.choice((f"{key}_", key.upper(), "", "id", "image", "text"))] = node.pop(key)
        elif kind == 2:
            node[key] = copy.deepcopy(chance.choice(inner))
        else:
            node[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return changed


def _nodes(content: Any) -> list[Any]:
    """All lists and dictionaries within."""
    if not isinstance(content, list | dict):
        return []
    values = content.values() if isinstance(content, dict) else content
    return [content, *(node for value in values for node in _nodes(value))]


def strings_of(content: Any) -> list[str]:
    """All text within, keys left out."""
    if isinstance(content, str):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [text for value in values for text in strings_of(value)]


def dump(content: Any) -> bytes:
    """JSON as careless writers make it: NaN, and halves of characters."""
    return json.dumps(content, ensure_ascii=True).encode()

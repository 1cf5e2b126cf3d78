"""Which members of a tar are the pictures of a sample, and in which order."""

import posixpath
import re
from typing import Any

from megatron_nvlm.data.building.pictures import reference
from megatron_nvlm.errors import UserError

_AUXILIARY = frozenset(("alpha", "annotation", "depth", "edge", "edges", "mask", "normal", "seg", "segmentation"))
"""Parts of names (`0.seg.png`) of pictures that belong to another one."""


def choose_members(named: list[Any], held: list[str], key: str) -> list[str]:
    """The members that are a sample's pictures, in order.

    Its JSON decides: the members that it names. Names of other files than those in the tar (the pictures' first places) only
    say the number. Without names, the pictures are those whose name is a suffix alone (`0.jpg`) or a number (`0.1.jpg`), or,
    if there are none, all but masks and the like; 2 stands before 10.

    Args:
        named: of `image_names`.
        held: names after the key.

    Raises:
        UserError: the JSON names others than there are.
    """
    paths = [reference(one) for one in named]
    known = {name: name for name in held}
    known.update({posixpath.basename(f"{key}.{name}").lower(): name for name in held})
    found = [known.get(posixpath.basename(path).lower()) if isinstance(path, str) else None for path in paths]
    chosen = [name for name in found if name is not None]
    if named and len(chosen) == len(named):
        return chosen
    main = _main_members(held)
    if not named or (not chosen and len(main) == len(named)):
        if main or not held:
            return main
        raise UserError(f"its pictures are only {', '.join(held)}; name them in the 'images' of its json")
    told = ", ".join(str(path)[:80] for path in paths)
    raise UserError(f"its json names {len(named)} pictures ({told}) and it holds {', '.join(held) or 'none'}")


def _main_members(held: list[str]) -> list[str]:
    stems = {name: name.rpartition(".")[0] for name in held}
    main = [name for name in held if _AUXILIARY.isdisjoint(name.split("."))]
    if any(not stems[name] for name in main):
        main = [name for name in main if not stems[name] or stems[name][-1].isdigit()]
    return sorted(main, key=_natural)


def _natural(name: str) -> list[Any]:
    """Sort key by which 2.jpg comes before 10.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]

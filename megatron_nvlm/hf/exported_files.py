"""The Python files of an exported folder: code of exported_code/ and the torch-free files of the package that it uses.

In the package these files import one another by the package's names. A folder is flat, so an import of
`megatron_nvlm.image.tiling` becomes one of `.tiling` there; nothing else is changed.
"""

import re
from importlib.resources import files

_ROOT = "megatron_nvlm"
_ROOM = f"{_ROOT}.hf.exported_code"
_ENTRIES = ("configuration_nvlm", "modeling_nvlm", "image_processing_nvlm", "processing_nvlm")
"""Files that transformers opens itself: `auto_map` names them."""
_IMPORT = re.compile(rf"^from (?:{_ROOT}\.(?P<ours>[\w.]+)|\.(?P<beside>\w+)) import ", re.MULTILINE)


def exported_files(vision_class: str) -> dict[str, str]:
    """Text of every Python file that a folder carries, by its name there.

    Args:
        vision_class: of the family's record, as `siglip_nvlm.SiglipModel`.
    """
    vision = f"{_ROOM}.{vision_class.split('.')[0]}"
    module_of: dict[str, str] = {}
    texts: dict[str, str] = {}
    imports: dict[str, set[str]] = {}
    waiting = {*(f"{_ROOM}.{name}" for name in _ENTRIES), vision}
    while waiting:
        module = waiting.pop()
        package, stem = module.rsplit(".", 1)
        assert module_of.setdefault(stem, module) == module, f"{module} and {module_of[stem]} have one name in a folder"
        if stem not in texts:
            texts[stem] = (files(package) / f"{stem}.py").read_text()
            imported = {_module_of(found) for found in _IMPORT.finditer(texts[stem])}
            imports[stem] = {_flat(other) for other in imported}
            waiting |= imported
    by_name = {"modeling_nvlm": {_flat(vision)}}  # modules that a file imports by a name it reads
    added = {stem: _indirect(imports, stem, by_name.get(stem, set())) for stem in _ENTRIES}
    return {f"{stem}.py": _flattened(text) + _import_lines(added.get(stem, [])) for stem, text in sorted(texts.items())}


def _indirect(imports: dict[str, set[str]], stem: str, by_name: set[str]) -> list[str]:
    """Files that this one needs and does not import itself."""
    reached: set[str] = set()
    waiting = imports[stem] | by_name
    while waiting:
        reached |= waiting
        waiting = {other for file in waiting for other in imports[file]} - reached
    return sorted(reached - imports[stem])


def _import_lines(stems: list[str]) -> str:
    """The end of a file that transformers opens: from a local folder, transformers 4 copies only what that file imports."""
    if not stems:
        return ""
    lines = [f"from .{stem} import __name__ as _{stem}" for stem in stems]
    return "\n".join(
        ["", "# transformers 4 copies the files that this one imports, and not those that they import", *lines, ""]
    )


def _flattened(text: str) -> str:
    return _IMPORT.sub(lambda found: f"from .{_flat(_module_of(found))} import ", text)


def _module_of(found: re.Match[str]) -> str:
    return f"{_ROOT}.{found['ours']}" if found["ours"] else f"{_ROOM}.{found['beside']}"


def _flat(module: str) -> str:
    return module.rsplit(".", 1)[1]

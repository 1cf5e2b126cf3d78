"""Looks for faults in shard sets: `python -m tools.lint_shards DIR ...`. Status 1 if there are any.

A set with our index is compared with it (files, hashes, checksums of samples, image sizes, and with --tokenizer token
counts), and each record, tile and image is looked at. Tars without an index are checked as plain WebDataset. Every fault
is one line: place, kind, what is wrong. Fields and members that a build does not read are named in notes.
"""

import argparse
import os
import sys

from megatron_nvlm.data.building.lint import Check, lint
from megatron_nvlm.data.building.text import printable
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.errors import UserError
from megatron_nvlm.option_types import local_path, process_count, utf8_text
from megatron_nvlm.text.conversation import DEFAULT_SYSTEM
from megatron_nvlm.text.templates import TEMPLATES
from megatron_nvlm.text.tokenizer import Tokenizer

MOST_UNREAD = 20
"""Names of fields and members that are listed."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lint_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sets", type=local_path, nargs="+", metavar="DIR", help="folders of shards, or single tars")
    add("--headers-only", action="store_true", help="read images' headers alone: faster, and misses cut-off images")
    add(
        "--tokenizer", type=local_path, metavar="FILE", help="compare the index's token counts with this tokenizer.json"
    )
    add("--template", choices=tuple(TEMPLATES), default="chatml", help="with --tokenizer (default chatml)")
    add(
        "--system",
        type=utf8_text,
        default=DEFAULT_SYSTEM,
        help=f"with --tokenizer, or none (default {DEFAULT_SYSTEM!r})",
    )
    add("--processes", type=process_count, default=os.cpu_count() or 1, help="default: one for each core")
    options = parser.parse_args(arguments)
    try:
        counter = None
        if options.tokenizer:
            system = None if options.system.lower() in ("", "none", "null") else options.system
            counter = TextTokenCounter(Tokenizer.load(options.tokenizer), options.template, system)
        num_faults = 0
        for folder in options.sets:
            if not folder.exists():
                raise UserError(f"there is no {folder}; name a folder of shards or a tar")
            found = lint(folder, Check(not options.headers_only, counter), options.processes)
            for fault in found.faults:
                print(printable(str(fault)))
            for name, count in found.unread.most_common(MOST_UNREAD):
                print(printable(f"{folder}: note: the {name} of {count} samples is not read"))
            num_faults += len(found.faults)
            faults = f"{len(found.faults)} faults" if found.faults else "no fault"
            print(printable(f"{folder}: {found.num_samples} samples, {found.num_images} images, {faults}"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if num_faults else 0)


if __name__ == "__main__":
    main()

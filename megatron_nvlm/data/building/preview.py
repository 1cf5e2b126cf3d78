"""A look before a build: what the first samples of each input would become, with nothing written."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_nvlm.data.building.forms import FORMS, find_form
from megatron_nvlm.data.building.inputs import Input
from megatron_nvlm.data.building.pictures import present
from megatron_nvlm.data.building.samples import SampleSettings, Stored, make_sample, unread_parts
from megatron_nvlm.data.order.lengths import TextTokenCounter
from megatron_nvlm.data.prepare import stored_grid
from megatron_nvlm.data.shards.records import RawSample, is_whole
from megatron_nvlm.errors import UserError
from megatron_nvlm.text.conversation import read_turns

_MOST_CHARACTERS = 80
"""Of a turn that are shown."""


class Preview:
    """The lines to print, and how many of the samples that were looked at are good.

    Args:
        num_samples: looked at of each input.
        count_text: what cannot be tokenised is a reject.
    """

    def __init__(
        self, inputs: Sequence[Input], settings: SampleSettings, num_samples: int, count_text: TextTokenCounter | None
    ) -> None:
        self.inputs, self.settings, self.num_samples, self.count_text = inputs, settings, num_samples, count_text
        self.num_good, self.num_rejects = 0, 0
        self._unread: Counter[str] = Counter()

    def lines(self) -> Iterator[str]:
        """Each input with its first samples, then what was not read of them."""
        for source in self.inputs:
            yield f"{source.path}: {source.kind}, {len(source)} samples"
            yield from (f"  REJECT {fault}" for fault in source.faults)
            self.num_rejects += len(source.faults)
            for number in range(min(self.num_samples, len(source))):
                yield from self._show(source, number)
            yield from (f"  not read: {name} ({count})" for name, count in source.unread.items())
        yield f"{self.num_good} samples, {self.num_rejects} rejects"
        yield from (f"not read: the {name} of {count} samples" for name, count in self._unread.most_common())

    def _show(self, source: Input, number: int) -> Iterator[str]:
        yield f"  {source.where(number)}"
        try:
            sample = source.read(number)
            self._unread.update(unread_parts(sample, self.settings))
            record, pictures = make_sample(sample, self.settings)
            tokens = self.count_text(record) if self.count_text is not None else None
        except UserError as error:
            self.num_rejects += 1
            yield f"    REJECT {error}"
            return
        self.num_good += 1
        yield f"    form: {_form_of(sample.content, len(record['images']))}"
        yield from (f"    {line}" for line in _describe((record, pictures)))
        if tokens is not None:
            yield f"    {tokens} text tokens"


def _form_of(content: Mapping[str, Any], num_images: int) -> str:
    """The form that a good sample was read in, and the fields that told it."""
    name = find_form(present(content), num_images)
    told = [field for field in FORMS[name].fields if content.get(field) is not None]
    return f"{name} ({', '.join(told)})"


def _describe(stored: Stored) -> Iterator[str]:
    """Each picture with its size and tiles, and each turn with its first characters."""
    record, pictures = stored
    raw = RawSample("", record, pictures)
    for place, image in enumerate(record["images"]):
        own = [name for name in pictures if name.split(".")[0] == str(place)]
        if any(is_whole(name) for name in own):
            yield f"picture {place}: {image['width']}x{image['height']} pixels, whole ({', '.join(own)})"
        else:
            cols, rows = stored_grid(raw, place)
            yield f"picture {place}: {image['width']}x{image['height']} pixels, {cols}x{rows} tiles, {len(own)} stored"
    for turn in read_turns(record):
        text = turn.text.replace("\n", "\\n")
        shown = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
        yield f"{turn.role}{'' if turn.is_learned else ' (not learned)'}: {shown}"

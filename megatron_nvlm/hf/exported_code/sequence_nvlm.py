"""Conversations to the tokens of a sample, by the files that training itself uses, and to text and back."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.assemble import AssembledSample, assemble
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.tag_ids import encode_tags
from megatron_nvlm.sequence.variants import Variant
from megatron_nvlm.text.conversation import Turn, arrange_turns, encode_conversation
from megatron_nvlm.text.templates import Template
from megatron_nvlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Layout:
    """How conversations with images become tokens."""

    variant: Variant
    template: Template
    tiling: TilingConfig
    """Of which the tag format and the thumbnail's tag count here."""
    tokens_per_tile: int
    """Vision tokens of a tile."""

    def assemble(
        self, turns: Sequence[Turn], grids: Sequence[Grid], tokenizer: Tokenizer, open_answer: bool
    ) -> AssembledSample:
        """Tokens of a conversation.

        Args:
            grids: of the images, in the order of their places in the text.
            open_answer: end with the start of an assistant's turn, for the model to write on.

        Raises:
            ValueError: places and images differ in number.
        """
        tags = [encode_tags(grid, self.tiling, self.variant, tokenizer, self.template) for grid in grids]
        first_tags = [tag.first_in_decoder for tag in tags]
        pieces = encode_conversation(turns, len(grids), tokenizer, self.template, None, open_answer, first_tags)
        return assemble(pieces, [lay_out_image(tag.ids, self.variant, self.tokens_per_tile) for tag in tags])

    def spell(self, turns: Sequence[Turn], open_answer: bool) -> str:
        """The conversation as text, `<image>` where an image goes: to be looked at, or for `read`."""
        form = self.template
        parts = [form.begin]
        for turn in arrange_turns(turns, form):
            speech = form.roles[turn.role]
            parts += [speech.opening, turn.text, speech.end, speech.behind]
        if open_answer:
            parts.append(form.roles["assistant"].opening)
        return "".join(parts)

    def read(self, text: str) -> tuple[list[Turn], bool] | None:
        """What `spell` wrote, taken apart: (turns, whether an answer is open); None for a text without turn marks.

        Raises:
            ValueError: the text begins as a spelled conversation and does not go on as one.
        """
        roles = self.template.roles
        marks = {role: speech.opening for role, speech in roles.items() if self.template.marks_turns}
        text = text.removeprefix(self.template.begin)
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
            said, end, text = text.partition(roles[role].end + roles[role].behind)
            if not end:
                raise ValueError(f"a prompt's last turn, of the {role}, has no end; give the turns")
            turns.append(Turn(role, said))
        return turns, False

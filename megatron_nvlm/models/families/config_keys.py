"""Keys of a foreign config.json: each is read, known to be without effect on what is computed here, or refused.

A key that nobody here knows may change numbers, so it is refused by name. A key whose value is null is absent.
"""

from collections.abc import Callable, Collection, Mapping
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

MustBe = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Of a key: whether a value is what is computed here, and which values are."""

COMMON: MustBe = {
    "quantization_config": (
        lambda value: False,
        "absent, since quantised weights are not read; take the plain weights",
    ),
}


def check_keys(config: Mapping[str, Any], read: Collection[str], must_be: MustBe, where: str) -> None:
    """Refuse keys that are not known, and values that mean another computation.

    Args:
        config: the keys of one model.
        read: keys that the caller reads.
        must_be: keys with one meaning here; those of COMMON are added.
        where: the file and section, for messages.

    Raises:
        UserError: naming the key.
    """
    must_be = {**COMMON, **must_be}
    given = {key: value for key, value in config.items() if value is not None}
    for key, (is_ours, words) in must_be.items():
        if key in given and not is_ours(given[key]):
            raise UserError(f"{where}: {key} is {given[key]!r}; it must be {words}")
    unknown = sorted(set(given) - set(read) - set(must_be) - WITHOUT_EFFECT)
    if unknown:
        raise UserError(
            f"{where}: {', '.join(unknown)} is not known here and may change what the model computes; remove it from the "
            "file if it does not"
        )

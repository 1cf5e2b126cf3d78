"""What stands beside the weights of an exported Hugging Face folder, so that transformers alone can use it.

The code (exported_code/), the image processor's and the processor's settings, the tokenizer, the chat template, and where an
answer ends. `config.json` and the weights are not written here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.exported_files import exported_files
from megatron_nvlm.image.tile_tags import TAG_FORMATS
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.families.visions import read_vision, vision_family_of
from megatron_nvlm.text.conversation import find_template
from megatron_nvlm.text.templates import Template
from megatron_nvlm.text.tokenizer import Tokenizer

AUTO_MAP_OF_PROCESSORS = {
    "AutoImageProcessor": "image_processing_nvlm.NVLMImageProcessor",
    "AutoProcessor": "processing_nvlm.NVLMProcessor",
}
IMAGE_CONTEXT_TOKEN = "<|vision_pad|>"
"""The release's placeholder, from Qwen2.5's tokenizer; Qwen2's has none."""
_PADDING_TOKENS = ("<|endoftext|>", "<pad>", "<unk>")
"""What fills short prompts of a batch up: the first that the tokenizer has, else the token that ends an answer."""


def auto_map(variant: str) -> dict[str, str]:
    """The `auto_map` of config.json."""
    model = f"modeling_nvlm.NVLM_{variant.upper()}_Model"
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    return {
        "AutoConfig": f"configuration_nvlm.NVLM_{variant.upper()}_Config",
        **dict.fromkeys(names, model),
        **AUTO_MAP_OF_PROCESSORS,
    }


def image_context_token_id(tokenizer_file: Path, vocab_size: int) -> int | None:
    """The id that stands in prompts where a vision token goes: one that no text becomes.

    The release's placeholder if the tokenizer has it, else the first row of the embedding that the tokenizer does not
    use; None if there is none (prompts then say by `vision_index` alone where vision tokens go).
    """
    try:
        vocabulary = _read_vocabulary(tokenizer_file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{tokenizer_file} is no tokenizer.json ({error})") from error
    if IMAGE_CONTEXT_TOKEN in vocabulary:
        return vocabulary[IMAGE_CONTEXT_TOKEN]
    unused = max(vocabulary.values()) + 1
    return unused if unused < vocab_size else None


def write_code(folder: Path, vision_class: str) -> None:
    """The model's code, which needs torch, Pillow and transformers alone."""
    for name, text in exported_files(vision_class).items():
        (folder / name).write_text(text)


def write_companions(
    folder: Path,
    config: dict[str, Any],
    tokenizer_file: Path,
    template: str,
    system: str | None,
    tiling: TilingConfig,
) -> None:
    """Write everything but config.json and the weights.

    Args:
        folder: exists; files of the same names are replaced.
        config: what config.json holds.
        tokenizer_file: a tokenizer.json.
        template, system, tiling: as the run that trained the weights has them.

    Raises:
        UserError: the tokenizer does not have what the template needs, or a name is unknown.
    """
    form = find_template(template)
    if tiling.tag_format not in TAG_FORMATS:
        raise UserError(f"tiling.tag_format is {tiling.tag_format!r}; choose one of {', '.join(TAG_FORMATS)}")
    vision = read_vision(config, str(folder / "config.json"))
    family = vision_family_of(vision)
    tokenizer = Tokenizer.load(tokenizer_file)
    for name in form.special_tokens:
        tokenizer.special_id(name)
    jinja = chat_template(form, system)
    write_code(folder, family.exported_class)
    if tokenizer_file.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(jinja)
    described = {
        **_describe_tokenizer(config, tokenizer_file, form, jinja),
        "preprocessor_config.json": {
            "auto_map": AUTO_MAP_OF_PROCESSORS,
            "image_processor_type": "NVLMImageProcessor",
            "tile_size": config["force_image_size"],
            "max_tiles": tiling.max_tiles,
            "background": tiling.background,
            "image_mean": list(family.pixels.mean),
            "image_std": list(family.pixels.std),
        },
        "processor_config.json": {
            "auto_map": {"AutoProcessor": AUTO_MAP_OF_PROCESSORS["AutoProcessor"]},
            "processor_class": "NVLMProcessor",
            "variant": config.get("variant", "d"),
            "template": {"name": template, **form.content},
            "system": system,
            "tag_format": tiling.tag_format,
            "thumbnail_tag": tiling.thumbnail_tag,
            "tokens_per_tile": vision.tokens_per_tile,
            "img_context_token_id": _place_id(config, tokenizer_file),
        },
    }
    for name, content in described.items():
        _write_json(folder / name, content)


def _place_id(config: dict[str, Any], tokenizer_file: Path) -> int | None:
    """The token that stands where vision tokens go: the folder's own, or the first id that the tokenizer leaves free."""
    found = config.get("img_context_token_id")
    if found is not None:
        return found
    return image_context_token_id(tokenizer_file, config["llm_config"]["vocab_size"])


def _describe_tokenizer(
    config: dict[str, Any], tokenizer_file: Path, form: Template, jinja: str
) -> dict[str, dict[str, Any]]:
    """What transformers reads beside a tokenizer.json, by file."""
    vocabulary = _read_vocabulary(tokenizer_file)
    padding = next((token for token in _PADDING_TOKENS if token in vocabulary), form.turn_end)
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": form.turn_end,
            "pad_token": padding,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["llm_config"].get("max_position_embeddings", 32768),
            "chat_template": jinja,
        },
        "generation_config.json": {
            "eos_token_id": vocabulary[form.turn_end],
            "pad_token_id": vocabulary[padding],
            "do_sample": False,
        },
    }


def chat_template(template: Template, system: str | None) -> str:
    """The template as Jinja, for software that spells prompts by the tokenizer (text alone, or `<image>` in the text).

    The processor does not use it: it tokenises piece by piece, as training does.
    """
    roles = {
        role: (speech.opening + speech.lead, speech.end + speech.behind) for role, speech in template.roles.items()
    }
    opened = ", ".join(f"{role!r}: {before!r}" for role, (before, _) in roles.items())
    closed = ", ".join(f"{role!r}: {after!r}" for role, (_, after) in roles.items())
    lines = [f"{{%- set opened = {{{opened}}} -%}}", f"{{%- set closed = {{{closed}}} -%}}"]
    if template.begin:
        lines.append(f"{{{{- {template.begin!r} -}}}}")
    if template.system_joint:
        default = system + template.system_joint if system is not None and template.takes_system else ""
        lines.append(f"{{%- set joined = namespace(words={default!r}) -%}}")
    elif system is not None and template.takes_system:
        spelled = roles["system"][0] + system + roles["system"][1]
        lines.append(f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {spelled!r} -}}}}{{%- endif -%}}")
    lines += [
        "{%- for message in messages -%}",
        "{%- set said = namespace(words='') -%}",
        "{%- if message['content'] is string -%}{%- set said.words = message['content'] -%}{%- else -%}",
        "{%- for part in message['content'] -%}",
        "{%- set said.words = said.words + ('<image>' if part['type'] == 'image' else part['text']) -%}",
        "{%- endfor -%}{%- endif -%}",
        *_spelled_turn(template),
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {template.roles['assistant'].opening!r} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _spelled_turn(template: Template) -> list[str]:
    """Jinja that spells the turn `said.words` of `message`."""
    stripped = [role for role, speech in template.roles.items() if speech.strips]
    words = f"(said.words | trim if message['role'] in {stripped!r} else said.words)" if stripped else "said.words"
    spelled = f"{{{{- opened[message['role']] + {words} + closed[message['role']] -}}}}"
    if not template.system_joint:
        return [spelled]
    return [
        f"{{%- if message['role'] == 'system' -%}}{{%- set joined.words = said.words + {template.system_joint!r} -%}}",
        "{%- else -%}",
        "{%- if message['role'] == 'user' -%}",
        "{%- set said.words = joined.words + said.words -%}{%- set joined.words = '' -%}",
        "{%- endif -%}",
        spelled,
        "{%- endif -%}",
    ]


def _read_vocabulary(tokenizer_file: Path) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added ones included."""
    stored = json.loads(tokenizer_file.read_text())
    vocabulary = stored["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram models list (token, score)
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in stored.get("added_tokens", [])}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

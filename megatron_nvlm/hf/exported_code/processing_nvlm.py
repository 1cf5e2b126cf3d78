"""Text and images to the inputs of NVLM, token for token as in training.

inputs = processor(text="<image>\\nWhat is this?", images=[picture])
inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BatchFeature, ProcessorMixin

from megatron_nvlm.image.tiling import Grid, TilingConfig
from megatron_nvlm.sequence.assemble import AssembledSample
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER, ROLES, Turn
from megatron_nvlm.text.templates import Template
from megatron_nvlm.text.tokenizer import Tokenizer

from .sequence_nvlm import Layout

_IS_OLD = int(transformers.__version__.split(".")[0]) < 5


class NVLMProcessor(ProcessorMixin):
    """Image processor, tokenizer and the layout of rows; `processor_config.json` holds what the arguments say.

    Args:
        image_processor: NVLMImageProcessor.
        tokenizer: a fast tokenizer.
        chat_template: of the tokenizer, for other software; this class works by `template`.
        variant: d, x or h.
        template: what stands around turns and images, as the file templates.py describes.
        system: a system turn put in front of conversations that have none; None for none.
        tag_format, thumbnail_tag: how tiles are named.
        tokens_per_tile: vision tokens of a tile.
        img_context_token_id: id for places of vision tokens; None for the padding id (`vision_index` tells them apart).
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    if _IS_OLD:  # newer ones find both by themselves and warn of this
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        variant: str = "d",
        template: dict[str, Any] | None = None,
        system: str | None = None,
        tag_format: str = "1d",
        thumbnail_tag: str = "<tile_global_thumbnail>",
        tokens_per_tile: int = 256,
        img_context_token_id: int | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if template is None or variant not in VARIANTS:
            raise ValueError(
                "processor_config.json must hold variant (d, x or h) and template; export the folder again"
            )
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError("NVLM's processor needs a fast tokenizer; the folder's tokenizer.json is one")
        self.variant = variant
        self.template = template
        self.system = system
        self.tag_format = tag_format
        self.thumbnail_tag = thumbnail_tag
        self.tokens_per_tile = tokens_per_tile
        self.img_context_token_id = img_context_token_id
        self._tokenizer = Tokenizer(copy.deepcopy(tokenizer.backend_tokenizer))

    @property
    def layout(self) -> Layout:
        """How rows are laid out."""
        tiling = TilingConfig(tag_format=self.tag_format, thumbnail_tag=self.thumbnail_tag)
        return Layout(VARIANTS[self.variant], Template.of(self.template), tiling, self.tokens_per_tile)

    @property
    def model_input_names(self) -> list[str]:
        """Of the tensors that calls return."""
        names = ["input_ids", "attention_mask", "pixel_values", "num_tiles", "vision_index"]
        context = ["context_input_ids", "context_vision_index", "context_intervals"]
        return names if self.variant == "d" else names + context

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        add_generation_prompt: bool = True,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> BatchFeature:
        """Inputs of the model for one prompt or a batch.

        Args:
            images: one image; a list of them, for all prompts in order; or a list of lists, for each prompt its own.
            text: a question with `<image>` where an image goes, a conversation (list of turns with `role` and
                `content`), a prompt that `apply_chat_template` spelled, or a list of any of these.
            add_generation_prompt: end with the start of an answer; a spelled prompt says itself whether it does.
            padding: True, or False where the prompts have equal lengths.
            padding_side: left for `generate`; right or left for training.
            return_tensors: only `pt`.
            others: what transformers' pipelines and trainers pass to any processor: `text_kwargs` and the like with the
                options above, and switches that must be off (videos, truncation, ...).

        Returns:
            `input_ids`, `attention_mask` and, if there are images, what modeling_nvlm.py's table lists.

        Raises:
            ValueError: images and their places differ in number, or an argument is none of the above.
        """
        if others:
            named: dict[str, Any] = dict(add_generation_prompt=add_generation_prompt, padding=padding)
            named |= dict(padding_side=padding_side, return_tensors=return_tensors)
            return self(images, text, **{**named, **_own_options(others)})
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; NVLM's processors make torch tensors, 'pt'")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be left or right")
        prompts = text if isinstance(text, list | tuple) and not _is_conversation(text) else [text]
        read = [self._read(prompt, add_generation_prompt) for prompt in prompts]
        turns, inside = [item[0] for item in read], [item[2] for item in read]
        if any(inside):
            if images is not None:
                raise ValueError("images stand in the conversations and in the argument images; give them once")
            images = inside
        per_prompt = _distribute(images, [sum(turn.num_images for turn in talk) for talk in turns])
        tiles = self.image_processor([image for own in per_prompt for image in own])
        grids = iter([Grid(*grid) for grid in tiles["grids"].tolist()])
        samples = []
        for (talk, is_open, _), own in zip(read, per_prompt, strict=True):
            samples.append(self.layout.assemble(talk, [next(grids) for _ in own], self._tokenizer, is_open))
        assert sum(sample.num_tiles for sample in samples) == len(tiles["pixel_values"])
        return self._tensors(samples, tiles["pixel_values"], bool(padding), padding_side == "left")

    def with_tiles(self, prompt: Any, pixel_values: torch.Tensor, tiles_of_images: Sequence[int]) -> BatchFeature:
        """Inputs for one prompt whose images are cut and normalised already.

        Args:
            pixel_values: [t, 3, S, S] of all images, each image's thumbnail last.
            tiles_of_images: of each image, its thumbnail included; 1 for an image of one tile, which has no thumbnail.

        Raises:
            ValueError: tiles, images and their places differ in number, or the tags name places in a grid.
        """
        counts = list(tiles_of_images)
        if sum(counts) != len(pixel_values) or any(count < 1 or count == 2 for count in counts):
            raise ValueError(
                f"there are {len(pixel_values)} tiles and the images have {counts}; an image has 1, or its tiles and a "
                "thumbnail"
            )
        if self.tag_format.startswith("2d") and max(counts, default=0) > 1:
            raise ValueError(f"tags of format {self.tag_format} name places in a grid; give the image to the processor")
        turns, is_open, _ = self._read(prompt, True)
        if sum(turn.num_images for turn in turns) != len(counts):
            raise ValueError(f"the prompt has not {len(counts)} {IMAGE_PLACEHOLDER}; write one for each image")
        grids = [Grid(max(count - 1, 1), 1) for count in counts]
        return self._tensors([self.layout.assemble(turns, grids, self._tokenizer, is_open)], pixel_values, True, True)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, as text or (`tokenize`) as inputs of the model.

        Args:
            conversation: turns with `role` and `content`; content is text, of the user with `<image>` where an image
                goes, or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
            return_dict: all inputs; otherwise `input_ids` alone.
            images: those that the conversation does not hold itself.
            kwargs: of `__call__`.
        """
        if kwargs.pop("continue_final_message", False):
            raise ValueError(
                "an answer cannot be continued; leave continue_final_message out and ask with the question"
            )
        if chat_template is not None:
            raise ValueError(
                "another chat_template would not give training's tokens; change processor_config.json's template"
            )
        if tokenize:
            inputs = self(images, conversation, add_generation_prompt, **kwargs)
            return inputs if return_dict else inputs["input_ids"]
        if not self.layout.template.marks_turns:
            raise ValueError(
                "this template does not mark turns, so its text cannot be read back; ask for tokenize=True"
            )
        if _is_conversation(conversation):
            return self.prompt(conversation, add_generation_prompt)
        return [self.prompt(turns, add_generation_prompt) for turns in conversation]

    def prompt(self, conversation: Any, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, or of a question, as the model is asked."""
        turns, is_open, _ = self._read(conversation, add_generation_prompt)
        return self.layout.spell(turns, is_open)

    def decode_answers(self, inputs: BatchFeature, outputs: torch.Tensor) -> list[str]:
        """Texts that `generate` wrote after the prompts."""
        texts = self.tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.removeprefix(self.layout.template.roles["assistant"].lead) for text in texts]

    def _read(self, prompt: Any, open_answer: bool) -> tuple[list[Turn], bool, list[Any]]:
        """(turns, whether an answer is open, images that stand in the turns)."""
        images: list[Any] = []
        if isinstance(prompt, str):
            spelled = self.layout.read(prompt)
            if spelled is not None:
                return *spelled, images
            turns = [Turn("user", prompt)]
        elif _is_conversation(prompt):
            turns = [_read_turn(turn, images) for turn in prompt]
        else:
            raise ValueError(
                f"a prompt is a {type(prompt).__name__}; give a question or a list of turns, or a list of these"
            )
        if self.system is not None and self.template["takes_system"] and turns[0].role != "system":
            turns = [Turn("system", self.system), *turns]
        return turns, open_answer, images

    def _tensors(
        self, samples: Sequence[AssembledSample], pixel_values: torch.Tensor, padding: bool, left: bool
    ) -> BatchFeature:
        if not padding and len({len(sample.tokens) for sample in samples}) > 1:
            raise ValueError("the prompts differ in length; leave padding on")
        pad_id = self.tokenizer.pad_token_id or 0
        place_id = pad_id if self.img_context_token_id is None else self.img_context_token_id
        ids = [np.where(sample.decoder_vision_index < 0, sample.tokens, place_id).tolist() for sample in samples]
        data = {
            "input_ids": _pad(ids, pad_id, left),
            "attention_mask": _pad([[1] * len(sample.tokens) for sample in samples], 0, left),
        }
        if len(pixel_values):
            data["pixel_values"] = pixel_values
            data["num_tiles"] = torch.tensor([sample.num_tiles for sample in samples])
            data["vision_index"] = _pad([sample.decoder_vision_index.tolist() for sample in samples], -1, left)
        if len(pixel_values) and self.variant != "d":
            data["context_input_ids"] = _pad([sample.context_tokens.tolist() for sample in samples], 0, False)
            data["context_vision_index"] = _pad([sample.context_vision_index.tolist() for sample in samples], -1, False)
            data["context_intervals"] = torch.stack(
                [_pad([sample.context_intervals[:, end].tolist() for sample in samples], 0, left) for end in (0, 1)],
                dim=-1,
            )
        return BatchFeature(data)


_GROUPS = ("processor_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
_OWN = ("add_generation_prompt", "padding", "padding_side", "return_tensors")
_MUST_BE_OFF = {
    "videos": "NVLM takes images; give frames as images",
    "audio": "NVLM takes images",
    "audios": "NVLM takes images",
    "truncation": "a cut prompt would lose vision tokens; shorten the text, or lower the image processor's max_tiles",
    "max_length": "prompts are as long as they are; leave it out",
    "continue_final_message": "an answer cannot be continued",
    "return_mm_token_type_ids": "there are none",
}


def _own_options(others: dict[str, Any]) -> dict[str, Any]:
    """What of transformers' options is ours; ValueError for those that ask for something else."""
    given = {name: value for name, value in others.items() if name not in _GROUPS}
    for group in _GROUPS:
        given |= others.get(group) or {}
    for name, value in given.items():
        if name in _MUST_BE_OFF and value not in (None, False):
            raise ValueError(f"{name} is {value!r}; {_MUST_BE_OFF[name]}")
        if name not in _MUST_BE_OFF and name not in _OWN:
            raise ValueError(f"NVLM's processor has no option {name}; it has {', '.join(_OWN)}")
    return {name: value for name, value in given.items() if name in _OWN}


def _is_conversation(text: Any) -> bool:
    return isinstance(text, list | tuple) and len(text) > 0 and all(isinstance(turn, dict) for turn in text)


def _read_turn(turn: dict[str, Any], images: list[Any]) -> Turn:
    """Role and text of a turn; images in it are appended to `images`."""
    role, content = ROLES.get(turn.get("role", turn.get("from", ""))), turn.get("content", turn.get("value"))
    if role is None or not isinstance(content, str | list):
        raise ValueError(f"a turn needs role (one of {', '.join(ROLES)}) and content, and this is {turn!r}")
    if isinstance(content, str):
        return Turn(role, content)
    said = ""
    for part in content:
        if part.get("type") == "text":
            said += part["text"]
        elif part.get("type") == "image":
            if role != "user":
                raise ValueError(f"an image stands in a turn of the {role}; images go into turns of the user")
            said += IMAGE_PLACEHOLDER
            found = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
            images += found[:1]
        else:
            raise ValueError(f"a turn's content has a part of type {part.get('type')!r}; NVLM takes text and image")
    return Turn(role, said)


def _distribute(images: Any, places: list[int]) -> list[list[Any]]:
    """Images of each prompt, by the places that its text has for them."""
    if images is None:
        images = []
    if not isinstance(images, list | tuple):
        images = [images]
    if images and all(isinstance(own, list | tuple) for own in images):
        counts = [len(own) for own in images]
        if counts != places:
            raise ValueError(
                f"the prompts have {places} {IMAGE_PLACEHOLDER} and {counts} images; give each prompt its images"
            )
        return [list(own) for own in images]
    if len(images) != sum(places):
        raise ValueError(
            f"the prompts have {sum(places)} {IMAGE_PLACEHOLDER} and there are {len(images)} images; write "
            f"{IMAGE_PLACEHOLDER} where each image goes"
        )
    left = iter(images)
    return [[next(left) for _ in range(count)] for count in places]


def _pad(lists: Sequence[Sequence[int]], fill: int, left: bool) -> torch.Tensor:
    """[b, longest] of ragged lists."""
    longest = max(len(values) for values in lists)
    padded = []
    for values in lists:
        missing = [fill] * (longest - len(values))
        padded.append([*missing, *values] if left else [*values, *missing])
    return torch.tensor(padded, dtype=torch.long).reshape(len(lists), longest)

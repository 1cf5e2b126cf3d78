"""`model.chat`, called as on the card of NVIDIA's release of NVLM-D: a question about tiles that are cut already."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_nvlm.text.conversation import IMAGE_PLACEHOLDER

from .processing_nvlm import NVLMProcessor

Said = tuple[str, str]
"""A question and its answer."""


class ChatMixin:
    """What the release's model class offers beside transformers' own methods."""

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: Any,
        history: Sequence[Said] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
    ) -> Any:
        """Answer one question of a conversation.

        Args:
            tokenizer: of the same folder; its processor is opened from there.
            pixel_values: normalised tiles [t, 3, S, S] of all images, each image's thumbnail last; None for text alone.
            question: with `<image>` where an image goes; of a first question without one, the image stands in front.
            generation_config: a mapping of what `generate` takes, or a GenerationConfig.
            history: what was said before.
            num_patches_list: tiles of each image, thumbnails included; None for one image.

        Returns:
            The answer, and with `return_history` also the history with it.

        Raises:
            ValueError: tiles and images differ in number, or the folder's tags need more than the number of tiles.
        """
        # Its code runs already.
        processor = NVLMProcessor.from_pretrained(tokenizer.name_or_path, trust_remote_code=True)
        if pixel_values is not None and not history and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n{question}"
        turns = [
            {"role": role, "content": text}
            for said in history or ()
            for role, text in zip(("user", "assistant"), said, strict=True)
        ]
        turns.append({"role": "user", "content": question})
        if pixel_values is None:
            inputs = processor(text=turns)
        else:
            inputs = processor.with_tiles(turns, pixel_values, num_patches_list or [len(pixel_values)])
        model: Any = self
        own = generation_config if isinstance(generation_config, Mapping) else {"generation_config": generation_config}
        output = model.generate(**inputs.to(model.device), **own)
        answer = processor.decode_answers(inputs, output)[0].strip()
        return (answer, [*(history or ()), (question, answer)]) if return_history else answer

"""A folder's processor by this package's classes, without the code that stands in the folder."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from megatron_nvlm.hf.exported_code.image_processing_nvlm import NVLMImageProcessor
from megatron_nvlm.hf.exported_code.processing_nvlm import NVLMProcessor


def load_processor(folder: Path) -> NVLMProcessor:
    settings = json.loads((folder / "processor_config.json").read_text())
    for name in ("auto_map", "processor_class"):
        settings.pop(name)
    images = NVLMImageProcessor.from_pretrained(folder)
    return NVLMProcessor(images, PreTrainedTokenizerFast.from_pretrained(folder), **settings)

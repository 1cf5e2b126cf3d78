"""Exported folders of tiny models, and prompts with their preparation by training's pipeline."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from megatron_nvlm.data.prepare import PreparedSample, SamplePipeline
from megatron_nvlm.data.shards.records import RawSample
from megatron_nvlm.hf.companions import auto_map, write_companions
from megatron_nvlm.hf.config_json import describe_folder
from megatron_nvlm.hf.weight_tables import nvlm_rows
from megatron_nvlm.image.tiling import TilingConfig
from megatron_nvlm.models.config import ModelConfig, resolve_model
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.nvlm_model import NVLMModel
from megatron_nvlm.models.weight_rows import convert_to_theirs
from megatron_nvlm.sequence.variants import VARIANTS
from megatron_nvlm.text.build_tokenizer import qwen2_tokenizer
from megatron_nvlm.text.tokenizer import Tokenizer
from tests.support.shards import picture

VARIANT_NAMES = ("d", "x", "h")
TILE_SIZE, TOKENS_PER_TILE, BASE_TOKENS = 56, 4, 300
SYSTEM = "Answer the questions."


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation, `<image>` where an image goes, and the images' sizes."""

    turns: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def images(self) -> list[bytes]:
        return [picture(*size, seed=number) for number, size in enumerate(self.sizes)]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in self.turns]

    def prepare(self, pipeline: SamplePipeline) -> PreparedSample:
        """By training's pipeline, with an open answer."""
        record = {"conversation": self.messages, "images": [{}] * len(self.sizes)}
        pictures = {f"{number}.png": data for number, data in enumerate(self.images)}
        return pipeline.prepare(RawSample("prompt", record, pictures), open_answer=True)


PROMPTS = {
    "text only": Prompt((("user", "What is NVLM?"),)),
    "one tile": Prompt((("user", "<image>\nWhat is this?"),), ((40, 40),)),
    "six tiles": Prompt((("user", "Look: <image> Which is red?"),), ((180, 120),)),
    "two images": Prompt((("user", "<image> and <image>: compare."),), ((130, 60), (120, 130))),
    "two turns": Prompt(
        (("user", "<image> Hello."), ("assistant", "Hi!"), ("user", "And <image>?")), ((60, 130), (50, 50))
    ),
}


def pipeline_of(
    variant: str, template: str = "chatml", tag_format: str = "1d", base_tokens: int = BASE_TOKENS
) -> SamplePipeline:
    tiling = TilingConfig(tile_size=TILE_SIZE, tag_format=tag_format)
    tokenizer = Tokenizer(qwen2_tokenizer(base_tokens))
    return SamplePipeline(tokenizer, tiling, VARIANTS[variant], TOKENS_PER_TILE, 4096, template, SYSTEM)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """What `export` writes into config.json."""
    parts = resolve_model(dataclasses.replace(model, max_sequence_length=4096))
    described = describe_folder(parts, TilingConfig(max_tiles=6), "chatml", "float64")
    return {**described, "auto_map": auto_map(model.variant)}


def weights_of(model: NVLMModel, config: ModelConfig) -> dict[str, Tensor]:
    """A model's weights by the folder's names."""
    parts = resolve_model(config)
    ours = {name: parameter.detach() for name, parameter in named_parameters(model)}
    return convert_to_theirs(nvlm_rows(parts.variant, parts.language, parts.vision, config.cross_attention), ours)


def write_folder(
    folder: Path, model: NVLMModel, config: ModelConfig, template: str = "chatml", tag_format: str = "1d"
) -> Path:
    """Export a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(config), indent=2))
    weights = {name: weight.contiguous() for name, weight in weights_of(model, config).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder / "tokenizer.json")
    write_companions(
        folder,
        config_of(config),
        folder / "tokenizer.json",
        template,
        SYSTEM,
        TilingConfig(tag_format=tag_format, max_tiles=6),
    )
    return folder


def write_tokenizer(path: Path, base_tokens: int = BASE_TOKENS) -> None:
    qwen2_tokenizer(base_tokens).save(str(path))


def opened(images: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in images]


def rows_of(logits: Tensor, mask: Tensor) -> Tensor:
    """Those of real rows, sample by sample, [rows, vocabulary]."""
    return torch.cat([own[seen.bool()] for own, seen in zip(logits, mask, strict=True)])

"""NVLM-D, NVLM-X and NVLM-H for Hugging Face transformers: needs torch, transformers and Pillow.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="<image>\\nWhat is this?", images=[picture])
    answer = processor.decode_answers(inputs, model.generate(**inputs, max_new_tokens=64))

Inputs, as the processor makes them (training's rows, token for token):

| name                   | shape         | what                                                                          |
|------------------------|---------------|-------------------------------------------------------------------------------|
| `input_ids`            | [b, r]        | ids; anything where a vision token stands                                     |
| `attention_mask`       | [b, r]        | 0 for padding; on the left for `generate`                                     |
| `pixel_values`         | [t, 3, S, S]  | normalised tiles of all samples in order, each image's thumbnail last         |
| `num_tiles`            | [b]           | tiles of each sample, thumbnails included                                     |
| `vision_index`         | [b, r]        | number in its sample of the vision token that stands here; -1 for text (D, H) |
| `context_input_ids`    | [b, c]        | ids of tags in the context (X, H)                                             |
| `context_vision_index` | [b, c]        | number in its sample of the vision token that stands here; -1 for tags (X, H) |
| `context_intervals`    | [b, r, 2]     | range [start, end) of context rows that a row sees (X, H)                     |

Text alone needs `input_ids` only. Without `vision_index`, vision tokens go where `input_ids` is `img_context_token_id`.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .chat_nvlm import ChatMixin
from .configuration_nvlm import NVLM_D_Config, NVLM_H_Config, NVLM_X_Config, NVLMConfig
from .decoder_nvlm import Context, CrossAttention, KeyValue, LanguageModel
from .rows_nvlm import cover_rows, loss_of, positions_of
from .vision_nvlm import RMSNorm, VisionEmbeddings, VisionLayer, pixel_shuffle, vision_class_of

TILES_AT_ONCE = 8
"""Most tiles that pass through the encoder together; bounds memory."""
_IMAGE_INPUTS = ("pixel_values", "num_tiles", "image_flags", "vision_index", "context_vision_index")
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of transformers calls the key/value cache."""


@dataclass
class NVLMOutput(CausalLMOutputWithPast):
    """Loss, logits and cache, and what cross-attention layers keep of the context."""

    context_key_values: tuple[KeyValue, ...] | None = None


class NVLMModel(ChatMixin, PreTrainedModel, GenerationMixin):
    """What the three variants share; use the class of a variant."""

    config_class: type[NVLMConfig] = NVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer gives the targets of a whole step, so that micro-batches weigh by theirs
    _supports_cache_class = True
    _can_compile_fullgraph = False

    def __init__(self, config: NVLMConfig) -> None:
        config.check()
        super().__init__(config)
        hidden, width = config.llm_config.hidden_size, 4 * config.vision_config.hidden_size
        self.vision_model: Any = vision_class_of(config)(config)
        layers = {type(layer).__name__ for layer in self.vision_model.encoder.layers}
        self._no_split_modules = ["DecoderLayer", *sorted(layers)]
        self.mlp1: nn.Module
        if config.variant == "x":
            self.mlp1 = nn.Linear(width, hidden, bias=False)
        else:
            inner = config.llm_config.intermediate_size
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, inner, bias=False),
                nn.GELU(),
                nn.Linear(inner, hidden, bias=False),
            )
        self.language_model = LanguageModel(config)
        self.img_context_token_id: int | None = config.img_context_token_id
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        deviation = getattr(self.config.llm_config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            self._zero_bias(module)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            self._zero_bias(module)
        elif isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.class_embedding)
            nn.init.normal_(module.position_embedding)
        elif isinstance(module, VisionLayer):
            for scale in (module.ls1, module.ls2):
                nn.init.constant_(scale, getattr(self.config.vision_config, "initializer_factor", 0.1))
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.gate)

    @staticmethod
    def _zero_bias(module: nn.Module) -> None:
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer; None where it is the embedding."""
        return None if self.language_model.is_tied else self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output layer."""
        self.language_model.lm_head = new_embeddings

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """As transformers', without reentrance: layers share the context, whose graph would be walked twice."""
        own = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        super().gradient_checkpointing_enable(own, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers', and the configuration says the new size."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.llm_config.vocab_size = embedding.num_embeddings
        return embedding

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Normalised tiles [t, 3, S, S] -> vision tokens [t, tokens per tile, h]."""
        size = self.config.tile_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)} and this model takes tiles of [3, {size}, {size}]; "
                "make them with the folder's processor"
            )
        weight = self.vision_model.embeddings.patch_embedding.weight
        parts = [self.vision_model(part.to(weight)) for part in pixel_values.split(TILES_AT_ONCE)]
        return self.mlp1(pixel_shuffle(torch.cat(parts)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        num_tiles: Tensor | None = None,
        vision_index: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_vision_index: Tensor | None = None,
        context_intervals: Tensor | None = None,
        labels: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        context_key_values: tuple[KeyValue, ...] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> NVLMOutput | tuple[Any, ...]:
        """Logits of the rows, and the loss if there are labels. The table above says what the inputs are.

        Tensors over rows (`attention_mask`, `vision_index`, `context_intervals`) cover the rows in the cache too.

        Args:
            image_flags: [t] or [t, 1], 0 for tiles to leave out (the release's).
            labels: [b, r] the row's own token, -100 where it is no target: they are shifted here.
            vision_tokens: [b, n, h] instead of pixel_values, from `encode_images`.
            context_key_values: of an earlier call with the same context.
            past_key_values: the cache, by the name that transformers before 5.24 have for it.
            inputs_embeds: [b, r, h] of the rows, vision tokens in their places already, instead of `input_ids`.
            output_attentions: refused: the kernels of attention do not give their weights.
            logits_to_keep: number of last rows that logits are wanted of; 0 for all.
            num_items_in_batch: targets of all micro-batches of a step, by which the loss is divided instead of its own.

        Raises:
            ValueError: the inputs do not fit each other.
        """
        if output_attentions:
            raise ValueError("NVLM gives no attention weights; leave output_attentions out or set it to False")
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give the rows once, as input_ids or as inputs_embeds")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "NVLM generates with a cache that grows; leave cache_implementation out or set it to dynamic"
            )
        rows_before = 0 if cache is None else int(cache.get_seq_length())
        here = slice(rows_before, rows_before + rows.shape[1])
        if attention_mask is not None and attention_mask.shape != (len(rows), here.stop):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)} and the rows, cached ones included, are "
                f"{[len(rows), here.stop]}"
            )
        if pixel_values is not None:
            vision_tokens, vision_index = self.encode_images(
                rows, pixel_values, num_tiles, image_flags, vision_index, context_vision_index
            )
        index = None if vision_index is None else vision_index[:, here]
        hidden = rows if inputs_embeds is not None else self._embed(rows, vision_tokens, index)
        context = None
        if self.config.variant != "d" and context_intervals is not None:
            embeddings = None
            if context_key_values:
                num_rows = context_key_values[0][0].shape[2]
            else:
                embeddings = self._embed_context(context_input_ids, vision_tokens, context_vision_index)
                num_rows = embeddings.shape[1]
            context = Context.of(embeddings, context_intervals[:, here], num_rows) if num_rows else None
        positions = positions_of(attention_mask, here, hidden) if position_ids is None else position_ids
        states, kept = self.language_model.model(hidden, positions, attention_mask, cache, context, context_key_values)
        logits = self.language_model.logits(states[-1][:, -logits_to_keep:])
        output = NVLMOutput(
            loss=None if labels is None else loss_of(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            context_key_values=kept or None,
            **{_CACHE: cache},
        )
        return output.to_tuple() if return_dict is False else output

    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        num_tiles: Tensor | None = None,
        image_flags: Tensor | None = None,
        vision_index: Tensor | None = None,
        context_vision_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tiles to the vision tokens of each sample, and where these stand in the decoder.

        Returns:
            ([b, n, h], samples with fewer tokens filled up with zeros; [b, r] numbers, -1 for text).

        Raises:
            ValueError: tiles, samples and places differ in number.
        """
        if image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten() == 1]
        per_tile = self.config.tokens_per_tile
        if num_tiles is not None:
            tiles = num_tiles.tolist()
        elif len(input_ids) == 1:
            tiles = [len(pixel_values)]
        else:
            tiles = [count // per_tile for count in self._placeholders(input_ids).sum(1).tolist()]
        if sum(tiles) != len(pixel_values) or len(tiles) != len(input_ids):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} tiles and the {len(input_ids)} samples have {tiles}; give num_tiles "
                "as the folder's processor does"
            )
        if self.config.variant != "d" and context_vision_index is None and sum(tiles):
            raise ValueError(
                f"NVLM-{self.config.variant.upper()} needs context_input_ids, context_vision_index and context_intervals "
                "beside pixel_values; make the inputs with the folder's processor"
            )
        features = self.extract_feature(pixel_values)
        most = max(tiles)
        tokens = features.new_zeros(len(tiles), most * per_tile, features.shape[-1])
        for sample, own in enumerate(features.split(tiles)):
            tokens[sample, : len(own) * per_tile] = own.flatten(0, 1)
        if vision_index is None:
            vision_index = self._find_places(input_ids, tiles, context_vision_index)
        for index in (vision_index, context_vision_index):
            counts = torch.tensor(tiles, device=input_ids.device)[:, None] * per_tile
            if index is not None and bool((index >= counts).any()):
                raise ValueError("an index names vision tokens that its sample does not have; is num_tiles right?")
        return tokens, vision_index

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        if self.img_context_token_id is None:
            raise ValueError(
                "where vision tokens stand is not said; give vision_index (the folder's processor does) or set "
                "model.img_context_token_id to the id that stands in their places"
            )
        return input_ids == self.img_context_token_id

    def _find_places(self, input_ids: Tensor, tiles: list[int], context_vision_index: Tensor | None) -> Tensor:
        """[b, r]: places of the placeholder take, in order, the sample's vision tokens that are not in the context."""
        index = torch.full_like(input_ids, -1)
        if self.config.variant == "x":
            return index
        placeholders = self._placeholders(input_ids)
        for sample, count in enumerate(tiles):
            numbers = torch.arange(count * self.config.tokens_per_tile, device=input_ids.device)
            if context_vision_index is not None:
                numbers = numbers[~torch.isin(numbers, context_vision_index[sample])]
            places = int(placeholders[sample].sum())
            if places != len(numbers):
                raise ValueError(
                    f"sample {sample} has {places} places for vision tokens and {len(numbers)} vision tokens for them; "
                    f"a tile has {self.config.tokens_per_tile}"
                )
            index[sample, placeholders[sample]] = numbers
        return index

    def _embed(self, input_ids: Tensor, vision_tokens: Tensor | None, index: Tensor | None) -> Tensor:
        """[b, r] -> [b, r, h], with vision token `index[i]` in place of row i wherever `index[i]` is not -1."""
        embedding = self.get_input_embeddings()
        if vision_tokens is None or index is None or vision_tokens.shape[1] == 0:
            return embedding(input_ids)
        is_vision = index >= 0
        embedded = embedding(input_ids.masked_fill(is_vision, 0))
        chosen = vision_tokens.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, vision_tokens.shape[2]))
        return torch.where(is_vision[..., None], chosen.to(embedded.dtype), embedded)

    def _embed_context(self, ids: Tensor | None, vision_tokens: Tensor | None, index: Tensor | None) -> Tensor:
        if ids is None or index is None or (vision_tokens is None and bool((index >= 0).any())):
            raise ValueError(
                "context_intervals needs context_input_ids, context_vision_index and pixel_values; make the inputs with "
                "the folder's processor"
            )
        return self._embed(ids, vision_tokens, index)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, with all that it can: a cache, batches, sampling, beams, assistants, prompt lookup.

        Tiles are encoded once, and so are the keys and values of the context.

        Raises:
            ValueError: batches are padded on the right, or the inputs do not fit each other.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "prompts are padded on the right; generate needs padding on the left, as the processor does it"
            )
        for name in ("cache", "past_key_values"):
            if name in kwargs:
                kwargs[_CACHE] = kwargs.pop(name)
        images = {name: kwargs.pop(name, None) for name in _IMAGE_INPUTS}
        if images["pixel_values"] is not None and input_ids is not None:
            kwargs["vision_tokens"], kwargs["vision_index"] = self.encode_images(input_ids, **images)
            if images["context_vision_index"] is not None:
                kwargs["context_vision_index"] = images["context_vision_index"]
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What a step of `generate` gives to `forward`: the rows that are not in the cache, and all that belongs to them."""
        new_rows = input_ids.shape[1]
        if "next_sequence_length" in kwargs:  # transformers 5
            new_rows = kwargs["next_sequence_length"] or new_rows
        elif kwargs.get("cache_position") is not None:  # transformers 4
            new_rows = len(kwargs["cache_position"])
        kept = ("cache", "past_key_values", "use_cache", "output_hidden_states", "return_dict", "logits_to_keep")
        own = ("vision_tokens", "vision_index", "context_input_ids", "context_vision_index", "context_intervals")
        model_inputs = {name: kwargs[name] for name in (*kept, *own, "context_key_values") if name in kwargs}
        if position_ids is not None:
            model_inputs["position_ids"] = position_ids[:, -new_rows:]
        cover_rows(model_inputs, input_ids.shape[1])
        return model_inputs | dict(input_ids=input_ids[:, -new_rows:], attention_mask=attention_mask)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("context_key_values") is not None:
            model_kwargs["context_key_values"] = outputs["context_key_values"]
        return model_kwargs


class NVLM_D_Model(NVLMModel):
    """NVLM-D."""

    config_class = NVLM_D_Config


class NVLM_X_Model(NVLMModel):
    """NVLM-X."""

    config_class = NVLM_X_Config


class NVLM_H_Model(NVLMModel):
    """NVLM-H."""

    config_class = NVLM_H_Config

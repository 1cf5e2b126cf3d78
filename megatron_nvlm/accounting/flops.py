"""Operations of NVLM, counted from sizes: what real tokens, tiles and attended pairs need, never what padding costs.

A multiplication and an addition are two operations. Counted are the matrix products and the encoder's patch convolution;
norms, activations, softmax and rotary embedding are not (as everywhere where utilisation is reported). Self-attention
is causal inside each sample, cross-attention has each row's own range of the context. Backward needs, for each product,
as much again for the gradient of its input and for that of its weights; frozen weights have none of the latter, and no
layer below the first one that trains, or that a trained part reads, needs any.
"""

from collections.abc import Collection
from dataclasses import astuple, dataclass, field
from operator import add

from megatron_nvlm.models.config import ResolvedModel
from megatron_nvlm.models.cross_attention import CrossAttentionConfig
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.families.visions import vision_family_of
from megatron_nvlm.models.initialise import ADAPTERS
from megatron_nvlm.models.lora import LoraConfig
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.ops.interval_attention import segments
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.sequence.variants import Variant


@dataclass(frozen=True)
class Flops:
    """Operations by purpose."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0
    recompute: int = 0
    """Forward operations done again in the backward pass, to save memory."""
    needless: int = 0
    """Operations of the backward pass below the first layer that needs it, done all the same."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*map(add, astuple(self), astuple(other)))

    def times(self, count: int) -> "Flops":
        """These operations, repeated a number of times."""
        return Flops(*(amount * count for amount in astuple(self)))

    @property
    def model(self) -> int:
        """What the step needs: neither recomputation nor needless work. Model FLOPs utilisation (MFU) counts these."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def executed(self) -> int:
        """What the hardware does: recomputation and needless work too (HFU)."""
        return self.model + self.recompute + self.needless


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks of the model."""

    num_tokens: int
    """Decoder tokens."""
    self_pairs: int
    """Pairs of a decoder token and a row that it sees in self-attention."""
    num_context_tokens: int
    context_pairs: int
    """Pairs of a decoder token and a context token that it sees."""
    tiles: int
    num_targets: int
    """Decoder tokens whose next token is learned; no other passes the output layer."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, astuple(self), astuple(other)))


NO_WORK = Work(0, 0, 0, 0, 0, 0)


def count_work(micro_batch: MicroBatch, tokens_per_tile: int, dense_attention: bool = False) -> Work:
    """The real work of a micro-batch; padding is left out. Its pixels need not be there.

    Args:
        dense_attention: count every pair of the score matrices that the local backend's attention fills, masked or not,
            as `torch.utils.flop_counter` does: tokens squared for each sample. For comparing with that counter.
    """
    samples = len(micro_batch.keys)
    bounds = micro_batch.cu_seqlens[: samples + 1].tolist()
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    num_tokens = bounds[-1]
    if not num_tokens:  # all of its samples were bad
        return NO_WORK
    intervals = micro_batch.context_intervals[:num_tokens]
    num_context_tokens = int(intervals[:, 1].max())
    last_vision_token = int(micro_batch.decoder_vision_index.max())
    if len(micro_batch.context_vision_index):
        last_vision_token = max(last_vision_token, int(micro_batch.context_vision_index.max()))
    if dense_attention:
        self_pairs = sum(length**2 for length in lengths)
        context_pairs = sum((last - first) * (end - start) for first, last, start, end in segments(intervals))
    else:
        self_pairs = sum(length * (length + 1) // 2 for length in lengths)
        context_pairs = int((intervals[:, 1] - intervals[:, 0]).clamp(min=0).sum())
    return Work(
        num_tokens=num_tokens,
        self_pairs=self_pairs,
        num_context_tokens=num_context_tokens,
        context_pairs=context_pairs if num_context_tokens else 0,
        tiles=(last_vision_token + 1) // tokens_per_tile,
        num_targets=len(micro_batch.target_rows),
    )


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a micro-batch by part, as the model runs it: needless ones are among the input gradients."""

    vision: Flops
    """The whole encoder, over all tiles."""
    projector: Flops
    decoder_layer: Flops
    """One layer, without cross-attention."""
    cross_attention: Flops
    """What cross-attention adds to one layer that has it."""
    output_layer: Flops
    needless_of_layers: int
    """Of the input gradients of all layers without cross-attention, those that nothing needs."""
    needless_of_cross_attention: int

    def decoder(self, layers: int, cross_attention_layers: int) -> Flops:
        """A number of layers, some of them with cross-attention; without the output layer."""
        return self.decoder_layer.times(layers) + self.cross_attention.times(cross_attention_layers)


@dataclass(frozen=True)
class ModelSizes:
    """What the count depends on, besides the work."""

    variant: Variant
    language: LanguagePreset
    vision: VisionPreset
    cross_attention: CrossAttentionConfig
    recompute: str
    """none, selective or full, as in section `model`."""
    encodes_twice: bool = False
    """Whether an encoder that trains encodes its tiles again in the backward pass (vision_placement replicated)."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def cross_attention_layers(self) -> frozenset[int]:
        """Numbers of the layers with cross-attention; none for D."""
        if not self.variant.needs_cross_attention:
            return frozenset()
        return self.cross_attention.layers(self.language.num_layers)


def sizes_of(model: ResolvedModel, parallelism: ParallelismConfig) -> ModelSizes:
    """Those of a run's model."""
    return ModelSizes(
        model.variant,
        model.language,
        model.vision,
        model.config.cross_attention,
        model.config.recompute,
        encodes_twice=parallelism.vision_placement == "replicated",
        lora=model.config.lora,
    )


def count_flops(sizes: ModelSizes, work: Work, trainable: Collection[str]) -> ModelFlops:
    """Operations of the forward and backward pass of a micro-batch.

    Counted as the model runs: the decoder is run backward to its first layer whatever trains (what of that is needless is
    said apart), and every row passes the query and output projections of cross-attention, also one that sees no context.
    Every count is linear in the work, so the operations of a step are those of its micro-batches' work added up.

    Args:
        trainable: the parts that train (training/trainable.py names them).
    """
    trains = frozenset(trainable)
    language_trains, cross_trains = "language_model" in trains, "cross_attention" in trains
    context_has_gradient = bool(trains & {"vision_model", "vision_projection", "language_model"})
    language = sizes.language
    head, queries = language.head_size, language.query_size
    hidden, groups = language.hidden_size, language.num_query_groups
    around_attention = _sum(
        linear(work.num_tokens, hidden, queries + 2 * groups * head, language_trains),
        linear(work.num_tokens, queries, hidden, language_trains),
    )
    layer = _sum(
        around_attention,
        linear(work.num_tokens, hidden, 2 * language.ffn_hidden_size, language_trains),
        linear(work.num_tokens, language.ffn_hidden_size, hidden, language_trains),
        _adapters(sizes, work.num_tokens, ADAPTERS in trains),
    )
    self_attention = attention(work.self_pairs, queries)

    cross = sizes.cross_attention
    query_width = (cross.num_attention_heads or language.num_attention_heads) * head
    group_width = (cross.num_query_groups or groups) * head
    cross_query = linear(work.num_tokens, hidden, query_width, cross_trains)
    cross_linears = _sum(
        cross_query,
        linear(work.num_context_tokens, hidden, 2 * group_width, cross_trains, context_has_gradient),
        linear(work.num_tokens, query_width, hidden, cross_trains),
    )
    cross_attention = attention(work.context_pairs, query_width)
    below, begins_at_cross_attention = _layers_without_need(sizes, trains)
    needless = below * (layer + self_attention).input_gradient
    needless += begins_at_cross_attention * (around_attention + self_attention).input_gradient
    # Of cross-attention there, the gradient of its queries, and of what they are projected from.
    of_queries = (
        cross_query.input_gradient + (not cross_trains) * attention(work.context_pairs, query_width).forward // 2
    )
    return ModelFlops(
        vision=_vision(sizes, work.tiles, "vision_model" in trains),
        projector=_projector(sizes, work.tiles * sizes.vision.tokens_per_tile, trains),
        decoder_layer=_with_recompute(layer, self_attention, sizes.recompute),
        cross_attention=_with_recompute(cross_linears, cross_attention, sizes.recompute),
        output_layer=linear(work.num_targets, hidden, language.vocab_size, language_trains),
        needless_of_layers=needless,
        needless_of_cross_attention=begins_at_cross_attention * of_queries,
    )


def by_component(sizes: ModelSizes, flops: ModelFlops) -> dict[str, Flops]:
    """Operations of the whole model, on whatever ranks they are; a variant without cross-attention has none of it."""
    layers = flops.decoder_layer.times(sizes.language.num_layers) + flops.output_layer
    cross = flops.cross_attention.times(len(sizes.cross_attention_layers))
    return {
        "vision_model": flops.vision,
        "vision_projection": flops.projector,
        "cross_attention": cross + _needless(flops.needless_of_cross_attention),
        "language_model": layers + _needless(flops.needless_of_layers),
    }


def whole_model(sizes: ModelSizes, flops: ModelFlops) -> Flops:
    """All components together."""
    return _sum(*by_component(sizes, flops).values())


def _needless(operations: int) -> Flops:
    """What tells needless operations apart from the input gradients that they are counted among."""
    return Flops(input_gradient=-operations, needless=operations)


def _layers_without_need(sizes: ModelSizes, trains: frozenset[str]) -> tuple[int, bool]:
    """How many of the lowest layers need no backward pass, and whether the next one needs it from cross-attention on only.

    A layer needs one if something that trains lies in it or below: the embedding, a projector whose vision tokens stand in
    the decoder's sequence, adapters, or cross-attention with the projector behind its context.
    """
    projected = bool(trains & {"vision_model", "vision_projection"})
    in_sequence = sizes.variant.tiles_in_decoder or sizes.variant.thumbnail_in_decoder
    if trains & {"language_model", ADAPTERS} or (projected and in_sequence):
        return 0, False
    if sizes.cross_attention_layers and (projected or "cross_attention" in trains):
        return min(sizes.cross_attention_layers), True
    return sizes.language.num_layers, False


def linear(tokens: int, inputs: int, outputs: int, trains: bool, input_has_gradient: bool = True) -> Flops:
    """A linear layer over `tokens`."""
    products = 2 * tokens * inputs * outputs
    return Flops(products, products * input_has_gradient, products * trains)


def attention(pairs: int, width: int, has_gradient: bool = True) -> Flops:
    """Scores and their product with the values over `pairs`, for all heads together `width` wide.

    Backward is four such products; what a flash kernel does again on the way (the scores) is not counted.
    """
    products = 4 * pairs * width
    return Flops(products, 2 * products * has_gradient)


def _with_recompute(linears: Flops, core_attention: Flops, recompute: str) -> Flops:
    again = {
        "none": 0,
        "selective": core_attention.forward,
        "full": linears.forward + core_attention.forward,
    }[recompute]
    return linears + core_attention + Flops(recompute=again)


def adapter_sizes(language: LanguagePreset, target: str) -> tuple[int, int]:
    """Inputs and outputs of the linear layer beside which an adapter stands."""
    hidden, inner = language.hidden_size, language.ffn_hidden_size
    if target in ("gate_proj", "up_proj"):
        return hidden, inner
    if target in ("o_proj", "down_proj"):
        return (language.query_size if target == "o_proj" else inner), hidden
    return hidden, language.query_size if target == "q_proj" else language.num_query_groups * language.head_size


def _adapters(sizes: ModelSizes, tokens: int, train: bool) -> Flops:
    """Those of one layer."""
    lora = sizes.lora
    ends = [adapter_sizes(sizes.language, target) for target in (lora.targets if lora.rank else ())]
    return _sum(
        *(
            linear(tokens, inputs, lora.rank, train) + linear(tokens, lora.rank, outputs, train)
            for inputs, outputs in ends
        )
    )


def _vision(sizes: ModelSizes, tiles: int, trains: bool) -> Flops:
    preset = sizes.vision
    width, patches = preset.hidden_size, preset.patches_per_tile
    in_tower = vision_family_of(preset).tower_tokens(preset)
    tokens = tiles * in_tower
    layer = _sum(
        linear(tokens, width, 3 * width, trains, trains),
        linear(tokens, width, width, trains, trains),
        linear(tokens, width, preset.ffn_hidden_size, trains, trains),
        linear(tokens, preset.ffn_hidden_size, width, trains, trains),
        attention(tiles * in_tower**2, width, trains),
    )
    convolution = linear(tiles * patches, 3 * preset.patch_size**2, width, trains, input_has_gradient=False)
    once = convolution + layer.times(preset.num_layers)
    return once + Flops(recompute=once.forward if trains and sizes.encodes_twice else 0)


def _projector(sizes: ModelSizes, vision_tokens: int, trains: frozenset[str]) -> Flops:
    inputs, hidden = sizes.vision.shuffled_size, sizes.language.hidden_size
    own, encoder = "vision_projection" in trains, "vision_model" in trains
    if sizes.variant.projector == "linear":
        return linear(vision_tokens, inputs, hidden, own, input_has_gradient=encoder)
    inner = sizes.language.ffn_hidden_size
    # The norm before the first layer trains with it, so that layer's input has a gradient either way.
    return _sum(
        linear(vision_tokens, inputs, inner, own, own or encoder),
        linear(vision_tokens, inner, hidden, own, own or encoder),
    )


def _sum(*terms: Flops) -> Flops:
    return sum(terms, Flops())

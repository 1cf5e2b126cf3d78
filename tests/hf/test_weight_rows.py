"""Every row of the tables, there and back: no bit changes, and the names of both sides are all accounted for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nvlm.errors import UserError
from megatron_nvlm.hf.weight_tables import language_rows, nvlm_rows, vision_rows
from megatron_nvlm.models.families.language_family import LanguagePreset
from megatron_nvlm.models.families.languages import LANGUAGE_FAMILIES, LANGUAGE_PRESETS, family_of
from megatron_nvlm.models.families.vision_family import VisionPreset
from megatron_nvlm.models.initialise import named_parameters
from megatron_nvlm.models.sharding import cut, find_split
from megatron_nvlm.models.weight_rows import (
    CensusError,
    Row,
    check_our_names,
    check_their_names,
    convert,
    convert_to_theirs,
)
from megatron_nvlm.parallel.device import Device
from megatron_nvlm.sequence.variants import VARIANTS
from tests.support.tiny import VISION, tiny_config, tiny_model


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors in which no number stands twice, so that nothing can change places unseen."""
    start, tensors = 1, {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size).view(shape)
        start += size
    return tensors


def language_shapes(p: LanguagePreset) -> dict[str, tuple[int, ...]]:
    head, family = p.head_size, family_of(p)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (p.vocab_size, p.hidden_size),
        "model.norm.weight": (p.hidden_size,),
        "lm_head.weight": (p.vocab_size, p.hidden_size),
    }
    for n in range(p.num_layers):
        layer = f"model.layers.{n}."
        for part, heads in (("q", p.num_attention_heads), ("k", p.num_query_groups), ("v", p.num_query_groups)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (heads * head, p.hidden_size)
            if family.qkv_bias:
                shapes[f"{layer}self_attn.{part}_proj.bias"] = (heads * head,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (p.hidden_size, p.query_size)
        if family.query_key_norm:
            shapes |= {f"{layer}self_attn.{part}_norm.weight": (head,) for part in "qk"}
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (
            p.ffn_hidden_size,
            p.hidden_size,
        )
        shapes[f"{layer}mlp.down_proj.weight"] = (p.hidden_size, p.ffn_hidden_size)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (p.hidden_size,)
    return shapes


@st.composite
def language_presets(draw: st.DrawFn) -> LanguagePreset:
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 4))
    return LanguagePreset(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * 2 * draw(st.integers(1, 3)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=draw(st.integers(1, 20)),
        rotary_base=10_000,
        family=draw(st.sampled_from(list(LANGUAGE_FAMILIES))),
        kv_channels=draw(st.sampled_from([None, 2, 6])),
    )


@given(language_presets())
def test_language_models_go_there_and_back(preset: LanguagePreset) -> None:
    theirs = numbered(language_shapes(preset))
    rows = language_rows(preset)
    back = convert_to_theirs(rows, convert(rows, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@given(language_presets(), st.integers(1, 4))
def test_a_part_of_theirs_makes_a_part_of_ours(preset: LanguagePreset, ranks: int) -> None:
    """What lets a tensor-parallel rank read its slices alone: cutting and transforming may change places."""
    if preset.num_query_groups % ranks or preset.ffn_hidden_size % ranks or preset.vocab_size % ranks:
        return
    theirs = numbered(language_shapes(preset))
    for row in language_rows(preset):
        split = find_split(row.ours)
        if split is None or preset.hidden_size % ranks:
            continue
        for rank in range(ranks):
            partial = row.transform.for_part(ranks)
            assert partial is not None
            parts = [theirs[name].chunk(ranks, split.dim)[rank] for name in row.theirs]
            whole = row.transform.to_ours([theirs[name] for name in row.theirs])
            assert torch.equal(partial.to_ours(parts), cut(whole, split, rank, ranks)), row.ours


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 7), st.booleans())
def test_encoders_go_there_and_back_with_any_padding(heads: int, layers: int, padding: int, rms: bool) -> None:
    preset = VisionPreset(layers, heads * 2, 5, heads, "RMSNorm" if rms else "LayerNorm", qk_norm=rms, qkv_bias=not rms)
    rows = vision_rows(preset, padding_heads=padding)
    ours = numbered({row.ours: _vision_shape(row, preset) for row in rows})
    theirs = convert_to_theirs(rows, ours)
    assert len(theirs["encoder.layers.0.attn.qkv.weight"]) == 3 * (heads + padding) * 2
    for read_with in (rows, vision_rows(preset)):  # the reader need not know the padding
        back = convert(read_with, theirs)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], ours[name]) for name in ours)
    if padding and rms:
        theirs["encoder.layers.0.attn.q_norm.weight"][-1] = 1
        with pytest.raises(UserError, match="padding heads hold numbers other than zero"):
            convert(rows, theirs)


def _vision_shape(row: Row, preset: VisionPreset) -> tuple[int, ...]:
    width = preset.hidden_size
    if "linear_qkv.weight" in row.ours:
        return (3 * width, width)
    if "linear_qkv.bias" in row.ours:
        return (3 * width,)
    if "linear_proj.weight" in row.ours:
        return (width, width)
    return (width,)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_the_tables_are_complete(world_of_one: Device, variant: str, qk_norm: bool) -> None:
    """Each parameter of the real model stands in one row, and comes back as it was."""
    config = tiny_config(variant, qk_norm)
    ours = {name: parameter.detach() for name, parameter in named_parameters(tiny_model(config, world_of_one))}
    rows = nvlm_rows(VARIANTS[variant], LANGUAGE_PRESETS["tiny"], VISION, config.cross_attention)
    check_our_names(rows, ours)
    theirs = convert_to_theirs(rows, ours)
    assert sum(len(row.theirs) for row in rows) == len(theirs)
    back = convert(rows, theirs)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_every_finding_is_listed() -> None:
    preset = VisionPreset(1, 4, 4, 2, "LayerNorm", qk_norm=False, qkv_bias=True)
    rows = vision_rows(preset)
    names = [name for row in rows for name in row.theirs]
    with pytest.raises(CensusError) as lacking:
        check_their_names(rows, names[2:], "the folder f")
    assert str(lacking.value).startswith("the folder f lacks 2 tensors")
    assert [finding.split()[1] for finding in lacking.value.findings] == names[:2]
    with pytest.raises(CensusError) as extra:
        check_their_names(rows, [*names, "b", "a"])
    assert extra.value.findings == ["unknown: a", "unknown: b"]

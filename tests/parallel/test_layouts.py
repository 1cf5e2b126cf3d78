"""Every layout computes what one process computes: losses, every gradient and the weights of three steps, in float64.

A layout is a row of LAYOUTS, a batch kind a row of tests/support/batches.py, a model a row of MODELS. The core table runs
everywhere; the rest is marked slow.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_nvlm.models.lora import LoraConfig
from megatron_nvlm.parallel.device import use_device
from megatron_nvlm.parallel.groups import start_groups
from tests.support.batches import BATCH_KINDS, FIRST_TAG_ID
from tests.support.equality import (
    FROZEN_VISION,
    PRETRAIN,
    WITH_ADAPTERS,
    Case,
    Comparison,
    Layout,
    Record,
    compare,
    layout,
    record,
    train,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-9
GRAD_NORM_TOLERANCE = 1e-5  # core computes the norm in float32
EMBEDDING = "language_model.embedding.word_embeddings.weight"

MODELS = {
    "D": Case("d", "alternating"),
    "X": Case("x", "alternating"),
    "H": Case("h", "alternating"),
    "H with query and key norms": Case("h", "alternating", qk_norm=True),
}

CORE_LAYOUTS = {
    "TP2": layout(2, tp=2),
    "TP2 with SP, selective recompute": layout(2, tp=2, sp=True, recompute="selective"),
    "PP2": layout(2, pp=2),
    "PP2 with two virtual stages": layout(2, pp=2, vpp=2),
    "DP2, distributed optimizer": layout(2, dist_opt=True),
    "PP2, tiles of the step shared": layout(2, pp=2, vision="replicated", tiles=2),
    "TP2, encoder tensor parallel": layout(2, tp=2, vision="tensor_parallel"),
    "TP2 with SP, PP2, full recompute": layout(4, tp=2, sp=True, pp=2, recompute="full"),
    "TP2 with SP, PP2, tiles of the step shared": layout(4, tp=2, sp=True, pp=2, vision="replicated", tiles=1),
}
MORE_LAYOUTS = {
    "TP4 with SP": layout(4, tp=4, sp=True),
    "TP4": layout(4, tp=4),
    "PP4": layout(4, pp=4),
    "PP4, full recompute": layout(4, pp=4, recompute="full"),
    "TP2, PP2": layout(4, tp=2, pp=2),
    "TP2 with SP, PP2, two virtual stages": layout(4, tp=2, sp=True, pp=2, vpp=2),
    "PP2 with two virtual stages, full recompute": layout(2, pp=2, vpp=2, recompute="full"),
    "PP2, first stage lighter": layout(2, pp=2, pipeline_layout="Et|t*3L"),
    "PP2 with two virtual stages, uneven": layout(2, pp=2, vpp=2, pipeline_layout="Et|tt|tt|tL"),
    "PP2 with two virtual stages in DP2": layout(4, pp=2, vpp=2, dist_opt=True),
    "TP4 with SP, encoder tensor parallel": layout(4, tp=4, sp=True, vision="tensor_parallel"),
    "TP4, tiles of the step shared": layout(4, tp=4, vision="replicated", tiles=3),
    "PP2 with two virtual stages, tiles of the step shared": layout(2, pp=2, vpp=2, vision="replicated"),
    "DP2 of PP2, tiles of the step shared, distributed optimizer": layout(4, pp=2, dist_opt=True, vision="replicated"),
    "DP2 of TP2, encoder tensor parallel, distributed optimizer": layout(
        4, tp=2, dist_opt=True, vision="tensor_parallel"
    ),
    "DP2": layout(2),
    "DP2 of TP2": layout(4, tp=2),
    "DP2 of TP2 with SP, distributed optimizer": layout(4, tp=2, sp=True, dist_opt=True),
    "DP2 of PP2": layout(4, pp=2),
    "DP2 of PP2, distributed optimizer": layout(4, pp=2, dist_opt=True),
    "DP4, distributed optimizer": layout(4, dist_opt=True),
}
LAYOUTS = {**CORE_LAYOUTS, **MORE_LAYOUTS}

CORE_CASES = [MODELS["D"], MODELS["X"], MODELS["H with query and key norms"]]
ALL_CASES = [
    *MODELS.values(),
    *(replace(model, batches="alternating rest") for model in CORE_CASES),
    *(replace(model, trainable=FROZEN_VISION) for model in CORE_CASES),
    *(replace(model, trainable=PRETRAIN) for model in CORE_CASES),
]
# Where cross-attention stands: on the first layer, on the last alone, so that stages have all, some or none of it.
PLACES = [
    Case(variant, "mixed", interval=interval, offset=offset)
    for variant in "xh"
    for interval, offset in ((4, 0), (4, 3), (1, 0))
]
EACH_KIND = [Case(variant, kind) for kind in BATCH_KINDS for variant in "dxh"]


class Reference:
    """What one process gave, and what layouts gave: each computed when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._core: dict[int, list[dict[str, list[Comparison]]]] = {}

    def of(self, cases: list[Case]) -> Path:
        """The folder, with these cases in it."""
        if not all((self.folder / case.file_name).exists() for case in cases):
            run_ranks(1, record, cases, self.folder)
        return self.folder

    def core(self, name: str) -> list[list[Comparison]]:
        """A core layout, by rank. All of the same number of ranks run in the same processes, which saves their start."""
        ranks = CORE_LAYOUTS[name].ranks
        if ranks not in self._core:
            rows = {other: (CORE_CASES, own) for other, own in CORE_LAYOUTS.items() if own.ranks == ranks}
            self._core[ranks] = run_ranks(ranks, compare, rows, self.of(CORE_CASES))
        return [rank[name] for rank in self._core[ranks]]


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("one_process"))


def run_and_check(cases: list[Case], name: str, reference_run: Reference, loss_tolerance: float = TOLERANCE) -> None:
    """Run on the ranks of the layout and look at every number."""
    own, folder = LAYOUTS[name], reference_run.of(cases)
    ranks = run_ranks(own.ranks, compare, {name: (cases, own)}, folder)
    check(cases, [rank[name] for rank in ranks], folder, loss_tolerance)


def check(cases: list[Case], ranks: list[list[Comparison]], folder: Path, loss_tolerance: float = TOLERANCE) -> None:
    for number, case in enumerate(cases):
        expected = Record(**torch.load(folder / case.file_name, mmap=True))
        seen = [results[number] for results in ranks]
        assert any(rank.is_last_stage for rank in seen)
        for rank in seen:
            for what, distance in rank.losses.items():
                tolerance = loss_tolerance
                if what.startswith("grad norm"):
                    tolerance = max(GRAD_NORM_TOLERANCE, 10 * loss_tolerance)
                assert distance <= tolerance, f"{case}: {what} is off by {distance:.1e}"
            for what, distance in (rank.gradients | rank.weights).items():
                assert distance <= TOLERANCE, f"{case}: {what} is off by {distance:.1e}"
        names = {f"{name}, step {step}" for step, by_name in enumerate(expected.gradients) for name in by_name}
        assert {what for rank in seen for what in rank.gradients} == names
        assert {name for rank in seen for name in rank.weights} == expected.weights.keys()


@pytest.mark.parametrize("name", CORE_LAYOUTS)
def test_a_layout_computes_what_one_process_computes(reference_run: Reference, name: str) -> None:
    check(CORE_CASES, reference_run.core(name), reference_run.folder)


def test_every_parameter_has_a_gradient_to_compare(reference_run: Reference) -> None:
    """Otherwise two layouts could agree on nothing; tags of H reach the embedding through the context alone."""
    folder = reference_run.of(CORE_CASES)
    for case in CORE_CASES:
        gradients = Record(**torch.load(folder / case.file_name)).gradients[0]
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, f"{case}: {name}"
        assert gradients[EMBEDDING][FIRST_TAG_ID:].norm() > 0
        gates = [name for name in gradients if name.endswith(".gate")]
        assert len(gates) == (0 if case.variant == "d" else 2)


OTHER_FAMILY = [
    replace(MODELS["D"], language="parity_qwen3"),
    replace(MODELS["H with query and key norms"], language="parity_qwen3"),
    replace(MODELS["H"], language="parity_qwen3", trainable=PRETRAIN),
]
"""Tied embeddings over a pipeline, head norms over tensor-parallel ranks."""


@pytest.mark.parametrize(
    "name", ["TP2 with SP, selective recompute", "PP2 with two virtual stages", "TP2 with SP, PP2, full recompute"]
)
def test_tied_embeddings_and_head_norms(reference_run: Reference, name: str) -> None:
    run_and_check(OTHER_FAMILY, name, reference_run)


@pytest.mark.parametrize(
    "name", ["TP2, encoder tensor parallel", "PP2, tiles of the step shared", "TP2 with SP, selective recompute"]
)
def test_another_encoder(reference_run: Reference, name: str) -> None:
    run_and_check([replace(MODELS[variant], vision="parity_siglip") for variant in "XH"], name, reference_run)


ADAPTED = [
    replace(MODELS["D"], lora=LoraConfig(3, 6.0), trainable=WITH_ADAPTERS),
    replace(MODELS["H"], lora=LoraConfig(3, 6.0, targets=["q_proj", "v_proj", "up_proj"]), trainable=WITH_ADAPTERS),
    replace(MODELS["X"], lora=LoraConfig(2, 1.0), trainable=WITH_ADAPTERS, language="parity_qwen3"),
]
"""Adapters of all linear layers, of some parts of fused ones, and beside head norms."""


@pytest.mark.parametrize(
    "name",
    [
        "TP2",
        "TP2 with SP, PP2, full recompute",
        pytest.param("PP2 with two virtual stages", marks=pytest.mark.slow),
        pytest.param("DP2, distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_adapters(reference_run: Reference, name: str) -> None:
    run_and_check(ADAPTED, name, reference_run)


def test_adapters_train_alone(reference_run: Reference) -> None:
    """Every matrix of theirs has a gradient to compare, and nothing else of the language model has one."""
    folder = reference_run.of(ADAPTED)
    for case in ADAPTED:
        gradients = Record(**torch.load(folder / case.file_name)).gradients[0]
        assert all(gradient.norm() > 0 for gradient in gradients.values())
        adapters = [name for name in gradients if ".adapters." in name]
        assert len(adapters) == 4 * 2 * len(case.lora.targets)
        others = set(gradients) - set(adapters)
        assert all("cross_att" in name or name.startswith("vision_projection") for name in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "PP2 with two virtual stages, uneven"])
def test_every_layout_trains_every_model_frozen_or_not(reference_run: Reference, name: str) -> None:
    run_and_check(ALL_CASES, name, reference_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "DP2, distributed optimizer",
        "PP2 with two virtual stages",
        "TP2 with SP, PP2, full recompute",
        "TP2 with SP, PP2, tiles of the step shared",
    ],
)
def test_every_kind_of_batch(reference_run: Reference, name: str) -> None:
    run_and_check(EACH_KIND, name, reference_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PP2", "PP4", "PP2, first stage lighter", "TP2 with SP, PP2, two virtual stages"])
def test_cross_attention_may_stand_anywhere(reference_run: Reference, name: str) -> None:
    run_and_check(PLACES, name, reference_run)


@pytest.mark.slow
def test_interleaved_stages_of_unequal_depth(reference_run: Reference) -> None:
    cases = [replace(case, language="parity_6_layers") for case in CORE_CASES]
    run_and_check(cases, "PP2 with two virtual stages, uneven", reference_run)


def losses_of(case: Case, own: Layout, steps: int) -> list[float]:
    """On each rank: the losses of a longer run; zeros before the last stage."""
    device = use_device()
    start_groups(own.parallelism, device, seed=1, timeout_seconds=120)
    return train(case, own, device.torch_device, steps, keep=False).losses


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("placement", ["first_stage", "replicated"])
def test_images_text_and_both_in_turn_for_200_steps(placement: str) -> None:
    """Nothing hangs, and the losses stay those of one process."""
    case = Case("h", "image, text, mixed", qk_norm=True)
    (expected,) = run_ranks(1, losses_of, case, layout(1), 200)
    own = layout(4, tp=2, sp=True, pp=2, vision=placement, dist_opt=True)
    ranks = run_ranks(4, losses_of, case, own, 200)
    for losses in ranks[2:]:  # ranks of the last stage
        assert losses == pytest.approx(expected, rel=1e-7)  # rounding of 200 updates
    assert len(set(expected)) == 200  # every step did something


@pytest.mark.slow
@pytest.mark.parametrize("precision,tolerance", [("fp32", 2e-6), ("bf16", 1e-2)])
@pytest.mark.parametrize("name", CORE_LAYOUTS)
def test_losses_in_the_precisions_of_training(
    reference_run: Reference, name: str, precision: str, tolerance: float
) -> None:
    cases = [replace(model, precision=precision) for model in CORE_CASES]
    run_and_check(cases, name, reference_run, tolerance)

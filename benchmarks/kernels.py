"""Each fused operation beside its other forms: milliseconds, rate of useful work, error against float64.

`python -m benchmarks.kernels [--steps 20]` on a machine with a GPU; on a CPU it runs the plain forms at small sizes.

Interval attention is compared with a masked `scaled_dot_product_attention` (the plain form) and with variable-length flash
attention over runs of equal range, for which keys that several runs see are copied. Causal attention of a pack is compared
with one call a sample and with variable-length flash attention. Useful work is 4 * head size operations a head for each key
that a token sees, and 2.5 times as many in the backward pass (none for recomputed scores).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_nvlm.ops.causal_attention import causal_attention
from megatron_nvlm.ops.gated_add import gated_add
from megatron_nvlm.ops.interval_attention import (
    block_rows,
    interval_attention,
    plain_interval_attention,
    runs_of_equal_range,
)
from megatron_nvlm.ops.linear_cross_entropy import linear_cross_entropy
from megatron_nvlm.option_types import positive_int

Form = Callable[..., Tensor]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TILE, TAG = (256, 5) if ON_GPU else (16, 3)


@dataclass(frozen=True)
class Case:
    """Inputs of one attention, and what its tokens see."""

    name: str
    heads: int
    groups: int
    head_size: int
    intervals: np.ndarray
    num_keys: int

    def inputs(self) -> list[Tensor]:
        """Query, key, value."""
        generator = torch.Generator(DEVICE).manual_seed(1)
        shapes = [(len(self.intervals), self.heads), *[(self.num_keys, self.groups)] * 2]
        return [
            torch.randn(*shape, self.head_size, device=DEVICE, dtype=DTYPE, generator=generator).requires_grad_()
            for shape in shapes
        ]

    def operations(self) -> float:
        """Of the forward pass."""
        pairs = (self.intervals[:, 1] - self.intervals[:, 0]).astype(np.int64).sum()
        return 4.0 * float(pairs) * self.heads * self.head_size


def x_intervals(samples: int, tiles: int, text: int) -> tuple[np.ndarray, int]:
    """NVLM-X: tags see their tile, later text all tiles; question before, answer after."""
    rows: list[np.ndarray] = []
    for sample in range(samples):
        first = sample * tiles * TILE
        rows.append(np.zeros((10, 2)))
        rows += [np.tile([first + tile * TILE, first + (tile + 1) * TILE], (TAG, 1)) for tile in range(tiles)]
        rows.append(np.tile([first, first + tiles * TILE], (text, 1)))
    return np.concatenate(rows).astype(np.int32), samples * tiles * TILE


def h_intervals(samples: int, tiles: int, text: int) -> tuple[np.ndarray, int]:
    """NVLM-H: thumbnail and later text see all tiles with their tags."""
    length = tiles * (TILE + TAG)
    rows = [
        part
        for sample in range(samples)
        for part in (np.zeros((10, 2)), np.tile([sample * length, (sample + 1) * length], (TILE + text, 1)))
    ]
    return np.concatenate(rows).astype(np.int32), samples * length


def causal_intervals(lengths: Sequence[int]) -> np.ndarray:
    """Each token sees its sample up to itself."""
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return np.stack([starts, np.arange(sum(lengths)) + 1], axis=1).astype(np.int32)


def varlen_over_runs(intervals: np.ndarray) -> Form:
    """Flash attention of runs of equal range; rows that see nothing are left out and are zero."""
    from torch.nn.attention.varlen import varlen_attn

    runs = runs_of_equal_range(intervals)
    keys = [np.arange(*intervals[run[0]]) for run in runs]
    bounds = [np.cumsum([0, *map(len, parts)]) for parts in (runs, keys)]
    longest = [max(map(len, parts)) for parts in (runs, keys)]
    rows, columns = (torch.from_numpy(part).to(DEVICE) for part in map(np.concatenate, (runs, keys)))
    cu = [torch.from_numpy(bound).to(DEVICE, torch.int32) for bound in bounds]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = varlen_attn(query[rows], key[columns], value[columns], *cu, *longest)
        return torch.zeros_like(query).index_copy(0, rows, found)

    return run


def varlen_causal(lengths: Sequence[int]) -> Form:
    """Flash attention of all samples in one call."""
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=DEVICE)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, cu, cu, max(lengths), max(lengths), window_size=(-1, 0))

    return run


def milliseconds(run: Callable[[], object], steps: int) -> float:
    """Median time of a call; on a GPU of a captured graph's replay, so that launches do not count."""
    for _ in range(3):
        run()
    if ON_GPU:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times = []
    for _ in range(steps):
        if ON_GPU:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        else:
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def forward_backward(form: Form, inputs: Sequence[Tensor], above: Tensor) -> list[Tensor]:
    """Output and gradients."""
    for one in inputs:
        one.grad = None
    output = form(*inputs)
    output.backward(above)
    return [output.detach(), *(one.grad for one in inputs if one.grad is not None)]


def compare_attention(case: Case, forms: dict[str, Form], steps: int) -> None:
    """Table of one case."""
    inputs = case.inputs()
    above = torch.randn_like(inputs[0])
    exact = reference(case, inputs, above)
    print(f"\n{case.name}: {len(case.intervals)} tokens, {case.num_keys} keys, ", end="")
    print(f"{case.heads} heads, {case.groups} groups of {case.head_size}")
    print("| form | forward ms | both ms | forward TFLOP/s | both TFLOP/s | largest error |\n|---|---|---|---|---|---|")
    for name, form in forms.items():
        try:
            found = forward_backward(form, inputs, above)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
            with torch.no_grad():
                forward = milliseconds(lambda: form(*inputs), steps)  # noqa: B023
            both = milliseconds(lambda: forward_backward(form, inputs, above), steps)  # noqa: B023
        except Exception as failure:
            print(f"| {name} | {type(failure).__name__}: {str(failure).splitlines()[0][:120]} |")
            continue
        rates = [case.operations() * times / ms / 1e9 for ms, times in ((forward, 1.0), (both, 3.5))]
        print(f"| {name} | {forward:.3f} | {both:.3f} | {rates[0]:.0f} | {rates[1]:.0f} | {error:.1e} |", flush=True)


def reference(case: Case, inputs: Sequence[Tensor], above: Tensor) -> list[Tensor]:
    """The plain form in float64."""
    intervals = torch.from_numpy(case.intervals).to(DEVICE)
    wide = [one.detach().double().requires_grad_() for one in inputs]
    return forward_backward(lambda *three: plain_interval_attention(*three, intervals), wide, above.double())


def attention_forms(case: Case, causal_lengths: Sequence[int] | None = None) -> dict[str, Form]:
    """Ours first."""
    intervals = torch.from_numpy(case.intervals).to(DEVICE)
    blocks = torch.from_numpy(block_rows(case.intervals, case.num_keys)).to(DEVICE)

    forms: dict[str, Form] = {}
    if ON_GPU:
        forms["interval kernel"] = partial(_interval, intervals, blocks)
    if causal_lengths is None:
        forms["masked"] = lambda *three: plain_interval_attention(*three, intervals)
        if ON_GPU:
            forms["varlen over runs"] = varlen_over_runs(case.intervals)
        return forms
    bounds = np.cumsum([0, *causal_lengths]).tolist()
    forms["one call a sample"] = lambda *three: causal_attention(*three, bounds)
    if ON_GPU:
        forms["varlen"] = varlen_causal(causal_lengths)
    return forms


def _interval(intervals: Tensor, blocks: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return interval_attention(query, key, value, intervals, rows_of_blocks=blocks)


def compare_loss(rows: int, hidden: int, vocabulary: int, steps: int) -> None:
    """Output layer with cross entropy: fused, and logits whole."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    states = torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=DEVICE, dtype=DTYPE, generator=generator) * 0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE, generator=generator)
    print(f"\noutput layer and cross entropy: {rows} rows, hidden {hidden}, {vocabulary} columns")
    print("| form | both ms | peak GiB over the inputs |\n|---|---|---|")
    forms: dict[str, Form] = {
        "fused": lambda states, weight: linear_cross_entropy(states, weight, labels)[0],
        "whole logits": lambda states, weight: cross_entropy((states @ weight.T).float(), labels, reduction="sum"),
    }
    for name, form in forms.items():
        one = torch.ones((), device=DEVICE)
        run = partial(forward_backward, form, [states, weight], one)
        both, peak = milliseconds(run, steps), 0.0
        if ON_GPU:
            states.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"| {name} | {both:.3f} | {peak:.2f} |", flush=True)


def compare_gated_add(tokens: int, hidden: int, steps: int) -> None:
    """The gated residual: fused, and operation by operation."""
    x, residual = (torch.randn(tokens, 1, hidden, device=DEVICE, dtype=DTYPE).requires_grad_() for _ in range(2))
    gate = torch.full((1,), 0.3, device=DEVICE, dtype=DTYPE).requires_grad_()
    above = torch.randn_like(x)
    print(f"\ngated add: {tokens} tokens of {hidden}\n| form | both ms |\n|---|---|")
    forms: dict[str, Form] = {"fused": lambda *three: gated_add(three[0], None, three[1], three[2])}
    forms["plain"] = lambda x, residual, gate: residual + torch.tanh(gate) * x
    for name, form in forms.items():
        both = milliseconds(partial(forward_backward, form, [x, residual, gate], above), steps)
        print(f"| {name} | {both:.3f} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=20)
    steps = parser.parse_args().steps
    print(f"{torch.cuda.get_device_name() if ON_GPU else 'CPU'}, torch {torch.__version__}, {DTYPE}")
    samples, tiles, text = (8, 7, 400) if ON_GPU else (2, 7, 40)
    for heads, groups, size in ((8, 1, 128), (14, 2, 64)):
        for name, made in (("X", x_intervals), ("H", h_intervals)):
            case = Case(f"cross-attention of {name}", heads, groups, size, *made(samples, tiles, text))
            compare_attention(case, attention_forms(case), steps)
        for lengths in ([2200] * 4, [300, 2400, 900, 1800, 150, 3000], [8192]):
            lengths = lengths if ON_GPU else [length // 16 for length in lengths]
            intervals = causal_intervals(lengths)
            case = Case(f"causal, samples of {lengths}", heads, groups, size, intervals, len(intervals))
            compare_attention(case, attention_forms(case, lengths), steps)
    compare_loss(*((4096, 2048, 151_936) if ON_GPU else (256, 128, 4000)), steps)
    compare_gated_add(*((8192, 8192) if ON_GPU else (512, 512)), steps)


if __name__ == "__main__":
    main()

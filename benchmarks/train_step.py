"""One training step of D, X and H: seconds, tokens, tiles and the share of the GPU's peak that is useful work.

`python -m benchmarks.train_step [--language tiny] [--vision tiny] [--precision fp32] [--samples 4] [--steps 10]`

A process trains on micro-batches of made samples, the same ones again and again. Operations are those of the dry run's count
(accounting/flops.py): real tokens, causal halves, nothing for frozen weights. The share of the peak (MFU) compares them with
`--peak-tflops` at dense bf16 (989 for an H100); on a CPU it is left out. The three variants run one after the other in this
process, each with the same samples: `--text` tokens and an image of `--tiles` tiles with its thumbnail.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.accounting.flops import ModelSizes, count_flops, count_work, whole_model
from megatron_nvlm.estimate.sample import SampleShape, make_micro_batch
from megatron_nvlm.models.config import ModelConfig, ResolvedModel, resolve_model
from megatron_nvlm.models.parallelism import ParallelismConfig
from megatron_nvlm.models.precision import PRECISIONS, Precision
from megatron_nvlm.option_types import positive_float, positive_int
from megatron_nvlm.parallel.device import Device, use_device
from megatron_nvlm.parallel.groups import start_groups, stop_groups
from megatron_nvlm.runs.components import make_chunks
from megatron_nvlm.sequence.image_layout import lay_out_image
from megatron_nvlm.sequence.micro_batch import MicroBatch
from megatron_nvlm.training.optimizer import OptimizerConfig, build_optimizer
from megatron_nvlm.training.step import run_step, wrap_model
from megatron_nvlm.training.trainable import RECIPES, freeze

WARM_UP_STEPS = 3
TAG_TOKENS = 5
"""Of a tile, in a full vocabulary."""


@dataclass(frozen=True)
class Timing:
    """Of one variant."""

    parameters: int
    seconds: float
    tokens: int
    tiles: int
    flops: int
    """Of a step, without recompute."""
    peak_gib: float


def measure(model: ResolvedModel, options: argparse.Namespace, device: Device, precision: Precision) -> Timing:
    """The median of the steps after the warm-up."""
    micro_batch = made_micro_batch(model, options)
    work = count_work(micro_batch, model.vision.tokens_per_tile)
    if device.torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    chunks = make_chunks(model, ParallelismConfig(), precision, device.torch_device, seed=1)
    trainable = RECIPES[options.recipe]
    freeze(chunks, trainable)
    models = wrap_model(chunks, precision, use_distributed_optimizer=False)
    settings = OptimizerConfig(max_lr=1e-5, min_lr=1e-5, warmup_steps=0)
    optimizer, _ = build_optimizer(settings, models, 1000, precision, use_distributed_optimizer=False)
    seconds = []
    for step in range(WARM_UP_STEPS + options.steps):
        began = time.monotonic()
        # Reads the loss, so everything is done when it returns.
        run_step(models, iter([micro_batch]), 1, device.torch_device, optimizer)
        if step >= WARM_UP_STEPS:
            seconds.append(time.monotonic() - began)
    sizes = ModelSizes(model.variant, model.language, model.vision, model.config.cross_attention, "none")
    flops = whole_model(sizes, count_flops(sizes, work, trainable)).model
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.torch_device.type == "cuda" else 0.0
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return Timing(parameters, statistics.median(seconds), work.num_tokens, work.tiles, flops, peak)


def made_micro_batch(model: ResolvedModel, options: argparse.Namespace) -> MicroBatch:
    """Samples of one shape with random pixels and ids."""
    pictures = options.tiles + (options.tiles > 1)
    layout = lay_out_image([[0] * TAG_TOKENS] * pictures, model.variant, model.vision.tokens_per_tile)
    shape = SampleShape(options.text + len(layout.decoder_tokens), options.tiles, TAG_TOKENS)
    micro_batch = make_micro_batch(shape, model.variant, model.vision.tokens_per_tile, options.samples)
    generator = torch.Generator().manual_seed(1)
    size = model.vision.tile_size
    ids = torch.randint(0, model.language.vocab_size, micro_batch.tokens.shape, generator=generator)
    micro_batch.tokens.copy_(torch.where(micro_batch.decoder_vision_index < 0, ids, micro_batch.tokens))
    micro_batch.labels.copy_(ids)
    tiles = torch.randint(0, 256, (micro_batch.num_tiles, 3, size, size), dtype=torch.uint8, generator=generator)
    learned = (micro_batch.decoder_vision_index < 0).float()
    return replace(micro_batch, tiles=tiles, loss_mask=learned, boundaries=())  # boundaries: derive again


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--variants", default="dxh")
    add("--language", default="tiny")
    add("--vision", default="tiny")
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--backend", default="local")
    add("--recipe", default="sft", choices=RECIPES)
    add("--recompute", default="none")
    add("--samples", type=positive_int, default=4, help="of a step")
    add("--text", type=positive_int, default=200, help="tokens of text of a sample, all of them learned")
    add("--tiles", type=positive_int, default=6, help="of a sample's image, without the thumbnail")
    add("--steps", type=positive_int, default=10)
    add("--peak-tflops", type=positive_float, default=989.0)
    return made


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    device, precision = use_device(), PRECISIONS[options.precision]
    start_groups(ParallelismConfig(), device, seed=1)
    is_gpu = device.torch_device.type == "cuda"
    print(
        f"{torch.cuda.get_device_name() if is_gpu else 'CPU'}, torch {torch.__version__}, {options.precision}, ", end=""
    )
    print(f"backend {options.backend}, {options.language} with {options.vision}, recipe {options.recipe}\n")
    print("| NVLM | parameters | s/step | samples/s | tokens/s | tiles/s | TFLOP/s | MFU | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in options.variants:
        config = ModelConfig(
            variant, options.language, options.vision, backend=options.backend, recompute=options.recompute
        )
        timing = measure(resolve_model(config), options, device, precision)
        rate = timing.flops / timing.seconds / 1e12
        share = f"{100 * rate / options.peak_tflops:.1f} %" if is_gpu else "-"
        print(
            f"| {variant.upper()} | {timing.parameters / 1e6:,.0f} M | {timing.seconds:.3f} "
            f"| {options.samples / timing.seconds:.1f} | {timing.tokens / timing.seconds:,.0f} "
            f"| {timing.tiles / timing.seconds:.1f} | {rate:.2f} | {share} | {timing.peak_gib:.1f} |",
            flush=True,
        )
        if is_gpu:
            torch.cuda.empty_cache()
    stop_groups()


if __name__ == "__main__":
    main()

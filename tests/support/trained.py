"""A really trained tiny run: the demo's data and run file, a few steps by the entry point of training."""

import os
from pathlib import Path

from megatron_nvlm.demo import data as demo_data
from tests.support.launch import REPOSITORY, launch


def train_demo(folder: Path, steps: int, save_every: int, variant: str = "h", ranks: int = 1, *overrides: str) -> Path:
    """Train in `folder`; returns the run's folder. One process unless overrides and ranks say otherwise."""
    data = folder / "demo_data"
    if not data.exists():
        demo_data.build(data, 48, 16, 4)
    run_dir = folder / f"run_{variant}_{len(os.listdir(folder))}"
    launch(
        "megatron_nvlm.train",
        ranks,
        "--config",
        str(REPOSITORY / "configs" / f"demo_{variant}.yaml"),
        f"run_dir={run_dir}",
        f"data.train.0.path={data}/train_images",
        f"data.train.1.path={data}/train_text",
        f"data.valid={data}/heldout",
        f"data.tokenizer={data}/tokenizer.json",
        "data.num_workers=0",
        f"training.train_steps={steps}",
        "training.micro_batch_size=2",
        "training.global_batch_size=8",
        "optimizer.warmup_steps=1",
        f"checkpoint.save_every_steps={save_every}",
        "parallelism.tensor_model_parallel_size=1",
        *overrides,
    )
    return run_dir

"""What the tests of jobs share."""

import pytest

from megatron_nvlm.demo import data as demo_data

STEPS = 20


@pytest.fixture(scope="package")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few samples of the demo's data, and the overrides that make a short run of the demo of them."""
    folder = tmp_path_factory.mktemp("data") / "demo_data"
    demo_data.build(folder, train_samples=64, text_samples=16, heldout_samples=4)
    return [
        f"data.train.0.path={folder}/train_images",
        f"data.train.1.path={folder}/train_text",
        f"data.valid={folder}/heldout",
        f"data.tokenizer={folder}/tokenizer.json",
        f"training.train_steps={STEPS}",
        "checkpoint.save_every_steps=4",
        "optimizer.warmup_steps=2",
    ]

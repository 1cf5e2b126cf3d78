"""Training in which something goes wrong on purpose, started as `megatron_nvlm.train` is.

SPOILED_STEPS=3,5 makes the loss of the last rank NaN in those steps of this process (of one micro-batch each);
SLOW_SAVE=6 makes each save take so many seconds longer.
"""

import math
import os
import sys
import time
from typing import Any

from megatron_nvlm import train
from megatron_nvlm.checkpoint.async_save import CheckpointSaver
from megatron_nvlm.models.language_model import TargetLosses
from megatron_nvlm.training import step

_loss_function, _save = step.loss_function, CheckpointSaver.save
_calls = 0


def _spoiled(micro_batch: Any, losses: TargetLosses) -> Any:
    global _calls
    _calls += 1
    spoiled = os.environ.get("SPOILED_STEPS", "").split(",")
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if last and str(_calls) in spoiled:
        losses = losses._replace(total=losses.total * math.nan)
    return _loss_function(micro_batch, losses)


def _slow(self: CheckpointSaver, *arguments: Any, **named: Any) -> None:
    time.sleep(float(os.environ.get("SLOW_SAVE", "0")))
    _save(self, *arguments, **named)


if __name__ == "__main__":
    step.loss_function = _spoiled
    CheckpointSaver.save = _slow  # type: ignore[method-assign]
    sys.exit(train.main())

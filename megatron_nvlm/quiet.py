"""Import first in an entry point: what libraries do as they are imported, and the notices that they repeat on every rank."""

import logging
import warnings
from collections.abc import Callable

from megatron_nvlm.core_compat import leave_core_uncompiled

leave_core_uncompiled()
# Megatron-core says at import which GPU libraries it did not find, and PyTorch which of core's calls are old.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
warnings.filterwarnings("ignore", message="Apex is not installed.*")
warnings.filterwarnings(
    "ignore", category=FutureWarning, message=r".*(all_gather|reduce_scatter|load_state_dict|save_state_dict).*"
)
# Core (0.19) reads what is no tensor of a checkpoint alone on each rank, by PyTorch's functions for one process.
warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint\..*")
# Core asks views of its gradient buffers for `.grad`, on purpose.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf.*")
logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA build of PyTorch without a GPU


def _unless(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(beginning)


# How core would rather be called, once a layer or a rank (0.17 to 0.19); it does what we ask for all the same.
for _module, _beginning in {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "transformer.transformer_layer": "Rewrapping ModuleSpec",
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "dist_checkpointing.strategies.common": "load_common is deprecated",  # core's own way to read common.pt
}.items():
    logging.getLogger(f"megatron.core.{_module}").addFilter(_unless(_beginning))

"""Import first in an entry point: libraries' notices that a user can do nothing about are not repeated on every rank."""

import logging
import warnings

# Megatron-core says at import which GPU libraries it did not find, and PyTorch which of core's calls are old.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
warnings.filterwarnings("ignore", message="Apex is not installed.*")
warnings.filterwarnings(
    "ignore", category=FutureWarning, message=r".*(all_gather|reduce_scatter|load_state_dict|save_state_dict).*"
)
# Core asks views of its gradient buffers for `.grad`, on purpose.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf.*")
logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").setLevel(logging.ERROR)

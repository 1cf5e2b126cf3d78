# shellcheck shell=bash
# What every node's shell needs before it can run Python: edit this for your cluster. Sourced by the job scripts.

# A virtual environment in the repository, if there is one (or load your modules, or activate your own here).
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tensor-parallel communication overlaps with compute only in order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A rank whose peer is lost ends instead of waiting forever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Two images.
#   docker build -t megatron_nvlm .                     training on GPUs: NVIDIA's PyTorch image and this repository
#   docker build --target test .                        the tests, on a CPU: the build passes or fails with `make test`
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/megatron_nvlm/runs" megatron_nvlm \
#       torchrun --nproc-per-node 8 -m megatron_nvlm.train --config configs/FILE.yaml
# The folder that is mounted must be writable by user 10001. Not built by our CI, which has no container engine:
# tests/launch/test_images.py and hadolint are what checks this file (docs/status.md).

FROM python:3.11.13-bookworm AS test
RUN useradd --uid 10001 --create-home nvlm
COPY --chown=10001:10001 . /workspace/megatron_nvlm
WORKDIR /workspace/megatron_nvlm
USER 10001:10001
RUN make test

# 25.12: Python 3.12, a build of PyTorch 2.10, CUDA 13.1 (NVIDIA's release notes). It brings torch, Transformer Engine and
# apex; launch/image_install.sh keeps them and checks that Transformer Engine is one that this Megatron-core asks for.
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu
ARG MEGATRON_CORE=0.16.1
RUN useradd --uid 10001 --create-home nvlm
COPY --chown=10001:10001 . /workspace/megatron_nvlm
WORKDIR /workspace/megatron_nvlm
RUN MEGATRON_CORE="${MEGATRON_CORE}" launch/image_install.sh && mkdir -p data runs && chown 10001:10001 . data runs
ENV OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1
USER 10001:10001
HEALTHCHECK --interval=10m --timeout=2m --start-period=5m \
    CMD ["python", "-m", "megatron_nvlm.commands.doctor", "--quick"]
CMD ["python", "-m", "megatron_nvlm.train", "--help"]

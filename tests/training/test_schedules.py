"""Each schedule's learning rates are those of its formula (docs/training.md), step by step."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.training.optimizer import SCHEDULES, WSD_STYLES, OptimizerConfig, build_schedule, check_optimizer

HIGH, LOW = 1e-3, 1e-4
FALL: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "exponential": lambda share: 2 * 0.5**share - 1,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}
"""From 1 to 0 while a share of the decay goes from 0 to 1."""


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The formula of a step, from 1 on."""
    warmup, last = config.warmup_steps, config.decay_steps or steps
    if step <= warmup:
        return HIGH * step / warmup
    if config.schedule == "constant":
        return HIGH
    if step > last:
        return LOW
    if config.schedule == "inverse_square_root":
        return max(LOW, HIGH * math.sqrt(max(warmup, 1) / step))
    if config.schedule == "wsd":
        assert config.wsd_decay_steps is not None
        share = max(0.0, (step - last + config.wsd_decay_steps) / config.wsd_decay_steps)
        return LOW + (HIGH - LOW) * FALL[config.wsd_decay_style or "linear"](share)
    return LOW + (HIGH - LOW) * FALL[config.schedule]((step - warmup) / (last - warmup))


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    """What core's schedule sets in an optimizer."""
    group: dict[str, float] = {}
    optimizer = SimpleNamespace(param_groups=[group])
    schedule, found = build_schedule(config, optimizer, steps), []  # type: ignore[arg-type]
    for _ in range(steps):
        schedule.step(increment=1)
        found.append(group["lr"])
    return found


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    style=st.sampled_from([None, *WSD_STYLES]),
    warmup=st.integers(0, 5),
    decay=st.none() | st.integers(6, 30),
    wsd=st.integers(1, 20),
    steps=st.integers(6, 30),
)
def test_rates_are_those_of_the_formula(
    schedule: str, style: str | None, warmup: int, decay: int | None, wsd: int, steps: int
) -> None:
    own = {"wsd_decay_steps": min(wsd, (decay or steps) - warmup), "wsd_decay_style": style}
    config = OptimizerConfig(
        HIGH, LOW, warmup, decay_steps=decay, schedule=schedule, **(own if schedule == "wsd" else {})
    )
    check_optimizer(config, steps)
    assert rates(config, steps) == pytest.approx([rate(config, step, steps) for step in range(1, steps + 1)])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"schedule": "cos"}, "optimizer.schedule is 'cos'; choose one of cosine, linear"),
        ({"wsd_decay_steps": 3}, "optimizer.wsd_decay_steps is for schedule wsd and optimizer.schedule is cosine"),
        ({"wsd_decay_style": "linear", "schedule": "constant"}, "optimizer.wsd_decay_style is for schedule wsd"),
        ({"schedule": "wsd"}, "optimizer.wsd_decay_steps is None; schedule wsd needs a number from 1 to 8"),
        ({"schedule": "wsd", "wsd_decay_steps": 9}, "is 9; schedule wsd needs a number from 1 to 8"),
        ({"schedule": "wsd", "wsd_decay_steps": 2, "wsd_decay_style": "root"}, "is 'root'; choose one of linear"),
    ],
)
def test_what_makes_no_schedule_is_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_optimizer(OptimizerConfig(HIGH, LOW, 2, **keys), 10)  # type: ignore[arg-type]

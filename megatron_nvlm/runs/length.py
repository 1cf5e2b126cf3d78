"""How long a run is in steps, where its run file gives epochs."""

import math
from dataclasses import replace
from fractions import Fraction

from megatron_nvlm.config.rules import schedule_is_possible
from megatron_nvlm.data.loading.builder import OpenedData, make_plan
from megatron_nvlm.runs.entry import say
from megatron_nvlm.runs.resolve import ResolvedRun


def count_steps(run: ResolvedRun, data: OpenedData) -> ResolvedRun:
    """The run with a number of steps: as it is, or the fewest that hold its epochs of the order (docs/training.md).

    Raises:
        UserError: so few steps make no schedule.
    """
    training = run.config.training
    if training.epochs is None:
        return run
    one = data.order.places_of_epoch()
    places = math.ceil(one * Fraction(str(training.epochs)))
    plan = make_plan(data, run.config.data.packing, training.micro_batch_size, training.global_batch_size)
    steps = plan.num_steps(places)
    say(f"training.epochs={training.epochs:g} are {steps} steps; an epoch is the first {one} samples of the order")
    counted = replace(run, config=replace(run.config, training=replace(training, train_steps=steps)))
    schedule_is_possible(counted.config, counted.model, counted.world_size)
    return counted

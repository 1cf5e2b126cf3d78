"""What becomes of each key of a run file that is changed in a run that goes on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.config.load import load_run
from megatron_nvlm.config.run import RunConfig
from megatron_nvlm.data.fingerprint import PACKED_KEYS
from megatron_nvlm.errors import UserError
from megatron_nvlm.runs import changes
from megatron_nvlm.runs.changes import (
    EFFECTS,
    REFUSALS,
    Effect,
    order_changes,
    refuse_changes,
    refuse_other_order,
    settings_of,
)
from megatron_nvlm.runs.resolve import resolve_run

PATH = Path("runs/a/checkpoints/step_00000001")


def keys_of(kind: Any, prefix: str = "") -> set[str]:
    """Every key of a section, by its definition."""
    found: set[str] = set()
    for field in dataclasses.fields(kind):
        is_section = isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
        found |= keys_of(field.type, f"{prefix}{field.name}.") if is_section else {f"{prefix}{field.name}"}
    return found


def test_every_key_has_an_effect() -> None:
    """A new key must be given one here too: there is no fourth case beside taking effect, refused and without effect."""
    assert keys_of(RunConfig) == set(EFFECTS) and set(PACKED_KEYS) <= set(EFFECTS)


@pytest.mark.parametrize("key", [key for key, effect in EFFECTS.items() if effect in REFUSALS])
@pytest.mark.parametrize("goes_on", [True, False])
def test_refused_unless_allowed_by_name(key: str, goes_on: bool) -> None:
    refusal, changed = REFUSALS[EFFECTS[key]], {key: ("before", "now")}
    if not (refusal.of_weights or goes_on):
        refuse_changes(PATH, changed, [], goes_on)
        return
    with pytest.raises(
        UserError, match=rf'^{key} was "before" when the checkpoint {PATH} was written and is now "now"'
    ):
        refuse_changes(PATH, changed, [], goes_on)
    if refusal.can_be_allowed:
        refuse_changes(PATH, changed, [key], goes_on)
    else:
        with pytest.raises(UserError, match=f"allow_changes names {key}; what it can allow is data.packing.enabled, "):
            refuse_changes(PATH, changed, [key], goes_on)


@pytest.mark.parametrize("key", [key for key, effect in EFFECTS.items() if effect not in REFUSALS])
def test_what_takes_effect_or_has_none_is_not_refused(key: str) -> None:
    refuse_changes(PATH, {key: ([], [])}, [], goes_on=True)
    listed = changes.describe_effect(key, keep_schedule=True)
    assert bool(listed) == (EFFECTS[key] in (Effect.SCHEDULE, Effect.NEW_WEIGHTS))


def test_sets_without_a_name_are_told_as_before_there_were_names() -> None:
    run = resolve_run(load_run("demo_h"), 2)
    told = settings_of(run.config, run.model)["data.train"]
    assert [set(source) for source in told] == [{"path", "weight"}] * 2


def test_order_changes() -> None:
    before = {"data.seed": 1, "data.train": [[0, "a", 0.5]], "data.packing.enabled": False}
    assert order_changes(before, before) == [] and order_changes({}, before) == []
    now = {**before, "data.seed": 2, "data.packing.enabled": True, "data.sequence_length": 256}
    keys = order_changes(before, now)
    assert keys == ["data.packing.enabled", "data.seed", "data.sequence_length"]
    with pytest.raises(UserError, match=r"^data.seed, data.sequence_length give another order of samples"):
        refuse_other_order(PATH, keys, ["data.packing.enabled"])
    refuse_other_order(PATH, keys, keys)
    changes.check_permissions(keys)

"""Too many bad samples: sound runs are not stopped, rotten ones are, soon."""

import numpy as np
import pytest

from megatron_nvlm.training.bad_share import FALSE_ALARM_RATE, is_over


def stopped_after(share: float, limit: float, seed: int, samples: int = 20000, step: int = 16) -> int | None:
    """Samples until a run of that true share is stopped, asked after every step; None if it is not."""
    bad = (np.random.default_rng(seed).random(samples) < share).cumsum()
    return next((seen for seen in range(step, samples, step) if is_over(int(bad[seen - 1]), seen, limit)), None)


@pytest.mark.parametrize("limit", [0.01, 0.1])
def test_a_share_up_to_the_limit_stops_no_run(limit: float) -> None:
    """At the limit itself at most one run in 10,000 may be stopped: none of 60."""
    assert FALSE_ALARM_RATE == 1e-4
    assert all(stopped_after(limit, limit, seed) is None for seed in range(40))
    assert all(stopped_after(limit / 2, limit, seed) is None for seed in range(20))


@pytest.mark.parametrize(("times", "within"), [(3, 4000), (10, 500), (50, 64)])
def test_a_larger_share_stops_every_run(times: float, within: int) -> None:
    ends = [stopped_after(0.01 * times, 0.01, seed) for seed in range(20)]
    assert all(end is not None and end <= within for end in ends), ends


def test_at_once_if_all_is_bad() -> None:
    assert is_over(3, 3, 0.01) and not is_over(1, 1, 0.01)


def test_limits_at_the_ends() -> None:
    assert is_over(1, 1000, 0.0) and not is_over(0, 1000, 0.0)
    assert not is_over(1000, 1000, 1.0)

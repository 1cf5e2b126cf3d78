"""Whether a run has met too many bad samples: a test that may be asked after every step, however long the run."""

import math

FALSE_ALARM_RATE = 1e-4
"""Most runs that are stopped though the true share of their bad samples is at most the limit (our choice)."""
_ALTERNATIVES = 16


def is_over(bad: int, seen: int, limit: float) -> bool:
    """Whether this number of bad samples among those seen shows a share above the limit.

    The likelihood of what was seen is averaged over shares between the limit and 1 and divided by its likelihood at the
    limit. While the true share is at most the limit, this ratio is a nonnegative supermartingale of mean at most 1, so it
    ever passes 1 / FALSE_ALARM_RATE with at most that probability (Ville's inequality).

    Args:
        limit: between 0 and 1; with 0 any bad sample is too many, with 1 none is.
    """
    if limit <= 0 or limit >= 1:
        return limit <= 0 < bad
    ratios = []
    for number in range(_ALTERNATIVES):
        share = limit ** ((number + 0.5) / _ALTERNATIVES)  # evenly between the limit and 1, on a logarithmic scale
        good = (seen - bad) * math.log((1 - share) / (1 - limit))
        ratios.append(bad * math.log(share / limit) + good)
    largest = max(ratios)
    average = largest + math.log(sum(math.exp(ratio - largest) for ratio in ratios) / _ALTERNATIVES)
    return average > -math.log(FALSE_ALARM_RATE)

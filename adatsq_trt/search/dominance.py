"""A policy is never returned when a simpler one that keeps the budgets is no worse in anything and better in something.

Simpler are uniform, layer-only and time-only policies. What counts is what a user has: resident bytes, milliseconds
(where nobody knows them, mean activation bits) and the error on samples that nothing was chosen on. Errors are compared
on the same samples: *no worse* is a mean that is not larger; *better* in nothing but the error takes a paired interval
(`intervals`) that lies below zero. All means are over one batch, so this is a strict partial order: following it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adatsq_trt.costs import ROUNDING, Costs
from adatsq_trt.intervals import Floats, Interval, paired_difference


def no_costlier(one: Costs, other: Costs) -> bool:
    """Whether one policy has no more bytes and takes no more time than another."""
    return one.resident_bytes <= other.resident_bytes and one.time <= other.time * (1 + ROUNDING)


def dominates(one: Costs, other: Costs, difference: Interval) -> bool:
    """Whether one policy is no worse than another in bytes, time and error, and better in one of them.

    Args:
        one: costs of the policy.
        other: costs of the other policy.
        difference: the error of the one less that of the other, on the same samples.
    """
    if not no_costlier(one, other) or difference.value > 0:
        return False
    cheaper = one.resident_bytes < other.resident_bytes or one.time < other.time * (1 - ROUNDING)
    return cheaper or difference.high < 0


def undominated(chosen: int, simple: Sequence[int], costs: Mapping[int, Costs], errors: Mapping[int, Floats]) -> int:
    """The policy that is returned: the chosen one, unless a simple one dominates it.

    Args:
        chosen: number of a policy.
        simple: numbers of those that keep the budgets and may take its place.
        costs: of all of these.
        errors: of all of these, float64 [samples], on the same fresh samples.

    Returns:
        A policy that none of the simple ones dominates; of several that dominate the chosen one that of least error.
    """
    while True:
        better = [
            i
            for i in simple
            if i != chosen and dominates(costs[i], costs[chosen], paired_difference(errors[i], errors[chosen]))
        ]
        if not better:
            return chosen
        chosen = min(better, key=lambda i: (float(errors[i].mean()), costs[i].resident_bytes, i))

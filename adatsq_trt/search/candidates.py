"""Candidate assignments: sensitive layers get more bits, at several exchange rates between error and bits.

At a multiplier λ per bit every layer takes the format with the least  error + λ · bits.  Ranking layers by sensitivity
and cutting the ranking into tiers is the same thing: the multiplier says where the cuts lie, the formats' measured
errors say which tier a layer falls in. A low multiplier gives a rich assignment, a high one a cheap one.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Assignment: TypeAlias = tuple[int, ...]


def tiers(errors: Array, bits: Array, weight: Array, multiplier: float) -> NDArray[np.int64]:
    """Choose the format of every item at a multiplier.

    Args:
        errors: [formats, items].
        bits: [formats], ascending.
        weight: [items]: how many (step, layer) an item stands for.
        multiplier: error per bit.

    Returns:
        [items].
    """
    cheapest: NDArray[np.int64] = np.argmin(errors + multiplier * bits[:, None] * weight, axis=0)
    return cheapest


def steepest_multiplier(errors: Array, bits: Array, weight: Array) -> float:
    """A multiplier at which every item takes the cheapest format: the largest error saved by the smallest upgrade."""
    steps = np.diff(np.unique(bits))
    return float(errors.max()) / float(steps.min(initial=1.0) * weight.min()) + 1e-30


def allocate(errors: Array, bits: Array, weight: Array, budget: float) -> NDArray[np.int64]:
    """The formats with the least sum of errors whose bits stay within a budget.

    Bisects the multiplier (the Lagrangian optimum of the convex hull), then spends what is left on single upgrades in
    the order of error saved per bit.

    Args:
        errors: [formats, items].
        bits: [formats], ascending.
        weight: [items].
        budget: largest sum of weight * bits; at least that of the cheapest format everywhere.
    """
    high = steepest_multiplier(errors, bits, weight)
    low, chosen = high * 1e-12, np.zeros(errors.shape[1], dtype=np.int64)
    for _ in range(60):
        multiplier = float(np.sqrt(low * high))
        trial = tiers(errors, bits, weight, multiplier)
        if (bits[trial] * weight).sum() <= budget + 1e-9:
            chosen, high = trial, multiplier
        else:
            low = multiplier
    return spend_the_rest(errors, bits[:, None] * weight, budget, chosen)


def spend_the_rest(errors: Array, costs: Array, budget: float, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Single upgrades, best ratio first, while one fits.

    Args:
        errors: [formats, items].
        costs: [formats, items]; infinite where a format may not be taken.
        budget: largest sum of costs.
        chosen: [items].
    """
    chosen, items = chosen.copy(), np.arange(errors.shape[1])
    left = budget - costs[chosen, items].sum()
    while True:
        cost = costs - costs[chosen, items]
        saved = errors[chosen, items] - errors
        fits = (cost > 0) & (cost <= left + 1e-9) & (saved > 0)
        if not fits.any():
            return chosen
        ratio = np.where(fits, saved / np.where(fits, cost, 1.0), -np.inf)
        fmt, item = np.unravel_index(int(ratio.argmax()), ratio.shape)
        left -= cost[fmt, item]
        chosen[item] = fmt

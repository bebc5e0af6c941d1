"""Candidate assignments: sensitive layers get more bits, at several exchange rates between error and bits.

At a price λ per bit every layer takes the format with the least  error + λ · bits.  Ranking layers by sensitivity and
cutting the ranking into tiers is the same thing: the price says where the cuts lie, the formats' measured errors say
which tier a layer falls in. A low price gives a rich assignment, a high price a cheap one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Assignment: TypeAlias = tuple[int, ...]


def tiers(errors: Array, bits: Array, weight: Array, price: float) -> NDArray[np.int64]:
    """The format index of every item at a price.

    Args:
        errors: [formats, items].
        bits: [formats], ascending.
        weight: [items]: how many (step, layer) an item stands for.
        price: error per bit.

    Returns:
        [items].
    """
    return np.argmin(errors + price * bits[:, None] * weight, axis=0)


def allocate(errors: Array, bits: Array, weight: Array, budget: float) -> NDArray[np.int64]:
    """The formats with the least sum of errors whose bits stay within a budget.

    Bisects the price (the Lagrangian optimum of the convex hull), then spends what is left on single upgrades in the
    order of error saved per bit.

    Args:
        errors: [formats, items].
        bits: [formats], ascending.
        weight: [items].
        budget: largest sum of weight * bits; at least that of the cheapest format everywhere.
    """
    low, high = 0.0, float(errors.max() / max(np.diff(bits).min(initial=1.0) * weight.min(), 1e-12)) + 1.0
    chosen = np.zeros(errors.shape[1], dtype=np.int64)
    for _ in range(60):
        price = np.sqrt(low * high) if low > 0 else high * 1e-12
        trial = tiers(errors, bits, weight, price)
        if (bits[trial] * weight).sum() <= budget + 1e-9:
            chosen, high = trial, price
        else:
            low = price
    return spend_the_rest(errors, bits, weight, budget, chosen)


def spend_the_rest(
    errors: Array, bits: Array, weight: Array, budget: float, chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Single upgrades, best ratio first, while one fits."""
    chosen, items = chosen.copy(), np.arange(errors.shape[1])
    left = budget - (bits[chosen] * weight).sum()
    while True:
        cost = (bits[:, None] - bits[chosen]) * weight
        saved = errors[chosen, items] - errors
        fits = (cost > 0) & (cost <= left + 1e-9) & (saved > 0)
        if not fits.any():
            return chosen
        ratio = np.where(fits, saved / np.where(fits, cost, 1.0), -np.inf)
        fmt, item = np.unravel_index(int(ratio.argmax()), ratio.shape)
        left -= cost[fmt, item]
        chosen[item] = fmt


@dataclass(frozen=True)
class Plan:
    """The additive model's optimum: prices, tiers and what the rest of a path will cost at best.

    Attributes:
        errors: [formats, steps, layers], latent MSE of each rounding alone.
        bits: [formats], ascending.
        prices: [curve], ascending.
        tail_bits: [steps + 1, curve]: bits of steps t … at each price.
        tail_errors: [steps + 1, curve]: their error, accumulation included.
        price: the price whose plan just meets the budget.
    """

    errors: Array
    bits: Array
    prices: Array
    tail_bits: Array
    tail_errors: Array
    price: float

    def at(self, step: int, multiple: float) -> Assignment:
        """The step's assignment at a multiple of the plan's price."""
        layers = np.ones(self.errors.shape[2])
        return tuple(int(i) for i in tiers(self.errors[:, step], self.bits, layers, self.price * multiple))

    def remaining_error(self, step: int, bits_left: float) -> float:
        """Estimated error of steps `step` … within `bits_left`; infinite when even the cheapest rest is too dear."""
        affordable = self.tail_bits[step] <= bits_left + 1e-9
        return float(self.tail_errors[step][affordable].min(initial=np.inf))


def make_plan(errors: Array, bits: Array, budget: float, accumulation: float, points: int = 200) -> Plan:
    """Tabulate the additive model over prices.

    Args:
        errors: [formats, steps, layers].
        bits: [formats], ascending.
        budget: mean bits per (step, layer).
        accumulation: factor from the sum of single errors to the error of all together.
        points: prices in the table.
    """
    flat, ones = errors.reshape(len(bits), -1), np.ones(errors[0].size)
    steepest = max(float(flat.max()) / float(np.diff(bits).min(initial=1.0)), 1e-12)
    prices = np.geomspace(steepest * 1e-9, steepest * 2, points)
    plans = [tiers(flat, bits, ones, price).reshape(errors.shape[1:]) for price in prices]
    step_bits = np.array([bits[p].sum(axis=1) for p in plans]).T
    step_errors = np.array([np.take_along_axis(errors, p[None], 0)[0].sum(axis=1) for p in plans]).T
    within = [bits[p].mean() <= budget + 1e-9 for p in plans]
    price = float(prices[int(np.argmax(within))]) if any(within) else float(prices[-1])
    return Plan(errors, bits, prices, _suffix_sums(step_bits), accumulation * _suffix_sums(step_errors), price)


def _suffix_sums(rows: Array) -> Array:
    """[steps, n] → [steps + 1, n]: row t is the sum of rows t …; the last is zero."""
    sums = np.cumsum(rows[::-1], axis=0)[::-1]
    return np.concatenate([sums, np.zeros((1, rows.shape[1]))])


def step_candidates(plan: Plan, step: int, multiples: Sequence[float], previous: Assignment | None) -> list[Assignment]:
    """Distinct assignments for one step: the previous one first (fewer buckets), then the plan's tiers at each price."""
    proposals = [plan.at(step, multiple) for multiple in multiples]
    return list(dict.fromkeys([*([previous] if previous is not None else []), *proposals]))


def price_multiples(count: int) -> tuple[float, ...]:
    """Prices around the plan's own, a factor of 4 to each side; 1 itself is always among them."""
    if count == 1:
        return (1.0,)
    half = (count - 1) / 2
    return tuple(4.0 ** ((i - (count - 1) // 2) / half) for i in range(count))

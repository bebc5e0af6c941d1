"""The plan: allocations of the whole trajectory at several prices, from which every column takes its candidates.

At the plan's price the whole policy just meets the budget. At other prices around it the same model gives richer and
cheaper policies; their rows for step t are the candidates of column t, so a path can spend more at one step and less
at another, and what that does is measured on real latents.
"""

from __future__ import annotations


from dataclasses import dataclass

import numpy as np

from adatsq_trt.search.candidates import Array, Assignment, allocate, steepest_price, tiers
from adatsq_trt.search.joint import Choice, allocate_jointly, descend
from adatsq_trt.search.sensitivity import Sensitivity

Rows = tuple[Assignment, ...]
# Trust in the rows: see `joint`; the second is the hedge that selection on fresh samples may prefer.
SHRINKS = (0.5, 0.85)
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Plan:
    """Whole policies at several prices, and what the rest of a path will cost.

    Attributes:
        policies: the plan at its own price first, then at other prices; each a row of format indices per step.
        hedges: other allocations of the same budget, to be judged as whole policies only.
        tail_bits: [steps + 1, curve]: bits of steps t … at each of many prices.
        tail_errors: [steps + 1, curve]: their error, accumulation included.
    """

    policies: tuple[Rows, ...]
    hedges: tuple[Rows, ...]
    tail_bits: Array
    tail_errors: Array

    def candidates(self, step: int, previous: Assignment | None) -> list[Assignment]:
        """Distinct assignments for one step: the previous one first, because it opens no new bucket."""
        proposals = [rows[step] for rows in self.policies]
        return list(dict.fromkeys([*([previous] if previous is not None else []), *proposals]))

    def remaining_error(self, step: int, bits_left: float) -> float:
        """Estimated error of steps `step` … within `bits_left`; infinite when even the cheapest rest is too dear."""
        affordable = self.tail_bits[step] <= bits_left + 1e-9
        return float(self.tail_errors[step][affordable].min(initial=np.inf))


def make_plan(sensitivity: Sensitivity, bits: Array, budget: float, prices: int) -> Plan:
    """Allocate the budget over the trajectory, and the same at `prices - 1` other prices.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        budget: mean bits per (step, layer); at least the cheapest format's.
        prices: how many policies a column takes its candidates from.
    """
    contributions = sensitivity.contributions.double().numpy()
    steps, layers = contributions.shape[1:3]
    errors = sensitivity.smoothed_errors().numpy()
    problem = (contributions.reshape(len(bits), steps * layers, -1), errors.reshape(len(bits), -1), bits)
    ones, total = np.ones(steps * layers), budget * steps * layers
    shaped = [allocate_jointly(*problem, ones, total, shrink) for shrink in SHRINKS]
    own, price = _rows(shaped[0][0], steps), shaped[0][1]
    others = [_rows(descend(*problem, ones, price * m, SHRINKS[0]), steps) for m in price_multiples(prices) if m != 1]
    hedges = [_rows(choice, steps) for choice, _ in shaped[1:]]
    hedges.append(_rows(allocate(problem[1], bits, ones, total), steps))
    return Plan((own, *others), tuple(hedges), *_tails(errors, bits, sensitivity.accumulation(own)))


def price_multiples(count: int) -> tuple[float, ...]:
    """1 and `count - 1` prices around it, evenly in the logarithm, at most a factor of 4 away."""
    if count < 2:
        return (1.0,)
    reach = count // 2
    return tuple(4.0 ** (i / reach) for i in range(-reach, count - reach))


def _rows(choice: Choice, steps: int) -> Rows:
    return tuple(tuple(int(i) for i in row) for row in choice.reshape(steps, -1))


def _tails(errors: Array, bits: Array, accumulation: float) -> tuple[Array, Array]:
    """Bits and error of steps t … over a range of prices, each [steps + 1, curve]."""
    flat, ones = errors.reshape(len(bits), -1), np.ones(errors[0].size)
    steepest = steepest_price(flat, bits, ones)
    policies = [
        tiers(flat, bits, ones, price).reshape(errors.shape[1:])
        for price in np.geomspace(steepest * 1e-9, steepest * 2, _CURVE_POINTS)
    ]
    step_bits = np.array([bits[policy].sum(axis=1) for policy in policies]).T
    step_errors = np.array([np.take_along_axis(errors, p[None], 0)[0].sum(axis=1) for p in policies]).T
    return _suffix_sums(step_bits), accumulation * _suffix_sums(step_errors)


def _suffix_sums(rows: Array) -> Array:
    """[steps, n] → [steps + 1, n]: row t is the sum of rows t …; the last is zero."""
    sums = np.cumsum(rows[::-1], axis=0)[::-1]
    return np.concatenate([sums, np.zeros((1, rows.shape[1]))])



"""The plan: allocations of the whole trajectory at several prices, from which every column takes its candidates.

At the plan's price the whole policy just meets the budget. At other prices around it the same model gives richer and
cheaper policies; their rows for step t are the candidates of column t, the nearest prices first, so a path can spend
more at one step and less at another, and what that does is measured on real latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from adatsq_trt.search.candidates import Array, Assignment, allocate
from adatsq_trt.search.joint import Choice, allocate_jointly, descend
from adatsq_trt.search.sensitivity import Sensitivity

Rows = tuple[Assignment, ...]
# Trust in the rows: see `joint`; the second is the hedge that selection on fresh samples may prefer.
SHRINKS = (0.5, 0.85)
# Prices, relative to the plan's, at which the rest of a path is estimated.
_CURVE = (0.125, 0.25, 0.5, 0.75, 1.5, 2.0, 4.0, 8.0)
# Those whose whole policies are judged too, to show the Pareto front.
_FRONT = (0.25, 0.5, 2.0, 4.0)
# Candidates come from prices ever farther from the plan's: this factor apart, at most so many to each side.
_PRICE_STEP, _PRICE_STEPS = 1.35, 20
# One hedge weighs the first step's errors by e^1 and the last step's by 1. Early errors decide which picture a sample
# becomes; the few that stand at such a fork carry much of the mean error, and a calibration batch holds few of them.
EARLY_TILT = 1.0


@dataclass(frozen=True)
class Plan:
    """Whole policies at several prices, and what the rest of a path will do and cost.

    Attributes:
        policies: the plan at its own price first, then at prices far enough to show the Pareto front; each a row of
            format indices per step.
        columns: for each step its distinct candidates, the plan's own first, then those of the nearest prices.
        hedges: other allocations of the same budget, to be judged as whole policies only.
        tail_contributions: [steps + 1, rows]: what the plan's own steps t … will add to every projected error.
        tail_own_errors: [steps + 1]: sum of their single errors.
        tail_bits: [steps + 1, curve]: bits of steps t … at each of several prices, cheapest first.
        tail_errors: [steps + 1, curve]: predicted error of the plan's steps before t and those at that price from t.
    """

    policies: tuple[Rows, ...]
    columns: tuple[Rows, ...]
    hedges: tuple[Rows, ...]
    tail_contributions: Array
    tail_own_errors: Array
    tail_bits: Array
    tail_errors: Array

    def candidates(self, step: int, previous: Assignment | None) -> list[Assignment]:
        """Distinct assignments for one step: the previous one first, because it opens no new bucket."""
        return list(dict.fromkeys([*([previous] if previous is not None else []), *self.columns[step]]))

    def expected_error(self, projected: Array, step: int) -> float:
        """Final error of a path whose error so far is `projected`, if the rest follows the plan.

        Args:
            projected: [rows]: aᵀ δ of the path, scaled as the contributions are.
            step: steps behind the path.
        """
        together = np.square(projected + self.tail_contributions[step]).sum()
        alone = np.square(projected).sum() + self.tail_own_errors[step]
        return float((1 - SHRINKS[0]) * together + SHRINKS[0] * alone)

    def deviation_error(self, step: int, bits_left: float, own_bits: float) -> float:
        """What it costs, or saves, when the rest has other bits than the plan gives it; infinite when too few.

        Args:
            step: first step of the rest.
            bits_left: what the budget leaves for it.
            own_bits: what the plan would spend on it.
        """
        bits, errors = self.tail_bits[step], self.tail_errors[step]
        if bits_left < bits[0] - 1e-9:
            return math.inf
        return float(np.interp(bits_left, bits, errors) - np.interp(own_bits, bits, errors))


def make_plan(sensitivity: Sensitivity, bits: Array, budget: float, candidates: int) -> Plan:
    """Allocate the budget over the trajectory, at its own price and at others.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        budget: mean bits per (step, layer); at least the cheapest format's.
        candidates: distinct assignments per step, as far as there are so many.
    """
    contributions = sensitivity.contributions.double().numpy()
    steps, layers = contributions.shape[1:3]
    errors = sensitivity.smoothed_errors().numpy()
    problem = (contributions.reshape(len(bits), steps * layers, -1), errors.reshape(len(bits), -1), bits)
    ones, total = np.ones(steps * layers), budget * steps * layers
    shaped = [allocate_jointly(*problem, ones, total, shrink) for shrink in SHRINKS]
    own, price = shaped[0]

    def at(multiple: float) -> Choice:
        return descend(*problem, ones, price * multiple, SHRINKS[0])

    tilt = np.repeat(np.exp(np.linspace(EARLY_TILT, 0.0, steps)), layers)
    tilted = allocate_jointly(problem[0] * np.sqrt(tilt)[:, None], problem[1] * tilt, bits, ones, total, SHRINKS[1])[0]
    hedges = [*(choice for choice, _ in shaped[1:]), allocate(problem[1], bits, ones, total), tilted]
    curve = [*(at(multiple) for multiple in _CURVE), np.zeros_like(own), own]
    policies = tuple(_rows(choice, steps) for choice in (own, *(curve[_CURVE.index(m)] for m in _FRONT)))
    chosen = np.stack([choice.reshape(steps, layers) for choice in (own, *curve)])
    added = np.take_along_axis(contributions[None], chosen[:, None, :, :, None], 1)[:, 0].sum(axis=2)
    alone = np.take_along_axis(errors[None], chosen[:, None], 1)[:, 0].sum(axis=2)
    tails = np.stack([_suffix_sums(a) for a in added]), np.stack([_suffix_sums(a) for a in alone])
    bits_left = np.stack([_suffix_sums(bits[c].sum(axis=1)) for c in chosen[1:]])
    return Plan(
        policies,
        _columns(own, at, steps, candidates),
        tuple(_rows(choice, steps) for choice in hedges),
        tails[0][0],
        tails[1][0],
        *_increasing(bits_left.T, _spliced_errors(*tails).T),
    )


def _spliced_errors(tails: Array, alone: Array) -> Array:
    """Predicted error of the first policy's steps before t and another's from t.

    Args:
        tails: [1 + curve, steps + 1, rows]: summed contributions of steps t …; the first is the plan itself.
        alone: [1 + curve, steps + 1]: the same for single errors.

    Returns:
        [curve, steps + 1].
    """
    together: Array = np.square(tails[0, :1] - tails[0] + tails[1:]).sum(axis=-1)
    alternatives: Array = alone[0, 0] - alone[0] + alone[1:]
    return (1 - SHRINKS[0]) * together + SHRINKS[0] * alternatives


def _increasing(bits: Array, errors: Array) -> tuple[Array, Array]:
    """Sort each step's curve by bits and make its error never rise with bits: [steps + 1, curve] each."""
    order = np.argsort(bits, axis=1, kind="stable")
    bits, errors = np.take_along_axis(bits, order, 1), np.take_along_axis(errors, order, 1)
    return bits, np.minimum.accumulate(errors, axis=1)


def _columns(own: Choice, at: Callable[[float], Choice], steps: int, count: int) -> tuple[Rows, ...]:
    """For each step the first `count` distinct rows, going outwards from the plan's price."""
    columns: list[dict[Assignment, None]] = [{row: None} for row in _rows(own, steps)]
    for multiple in _outwards():
        if all(len(column) >= count for column in columns):
            break
        for column, row in zip(columns, _rows(at(multiple), steps), strict=True):
            column[row] = None
    return tuple(tuple(column)[:count] for column in columns)


def _outwards() -> Iterator[float]:
    for power in range(1, _PRICE_STEPS + 1):
        yield _PRICE_STEP**power
        yield _PRICE_STEP**-power


def _rows(choice: Choice, steps: int) -> Rows:
    return tuple(tuple(int(i) for i in row) for row in choice.reshape(steps, -1))


def _suffix_sums(rows: Array) -> Array:
    """[steps, …] → [steps + 1, …]: row t is the sum of rows t …; the last is zero."""
    sums = np.cumsum(rows[::-1], axis=0)[::-1]
    return np.concatenate([sums, np.zeros((1, *rows.shape[1:]))])

"""The plan: allocations of the whole trajectory at several multipliers, from which every column takes its candidates.

At the plan's multiplier the whole policy just meets the budget. At other multipliers around it the same model gives
richer and cheaper policies; their rows for step t are the candidates of column t, the nearest multipliers first, so a
path can spend more at one step and less at another, and what that does is measured on real latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.active import Active, cells_of, rows_of, spread
from adatsq_trt.search.budgets import Budgets
from adatsq_trt.search.candidates import Array, Assignment, allocate
from adatsq_trt.search.joint import Knapsack, Selection, Shrinkage, allocate_jointly, coordinate_descent
from adatsq_trt.search.lagrangian import Constraints, accumulated_errors, allocate_within, choose_stored_sets
from adatsq_trt.search.once import choose_weights, grids_of
from adatsq_trt.search.sensitivity import Sensitivity

Rows = tuple[Assignment, ...]
# See `joint`. The first is the plan's own; the others are hedges that selection on fresh samples may prefer.
SHRINKAGES = (
    Shrinkage(together=0.2, by_layer=0.5),
    Shrinkage(together=0.1, by_layer=0.4),
    Shrinkage(together=0.5, by_layer=0.0),
)
# The same with weights once: what different layers do to the picture is luck there (decision 0052).
ONCE_SHRINKAGES = (
    Shrinkage(together=0.0, by_layer=0.6),
    Shrinkage(together=0.0, by_layer=0.9),
    Shrinkage(together=0.0, by_layer=0.3),
)
# Multipliers, relative to the plan's, at which the rest of a path is estimated.
_CURVE = (0.125, 0.25, 0.5, 0.75, 1.5, 2.0, 4.0, 8.0)
# Those whose whole policies are judged too, to show the Pareto front.
_FRONT = (0.25, 0.5, 2.0, 4.0)
# Candidates come from multipliers ever farther from the plan's: this factor apart, at most so many to each side.
_PRICE_STEP, _PRICE_STEPS = 1.35, 20


@dataclass(frozen=True)
class Plan:
    """Whole policies at several multipliers, and what the rest of a path will do and cost.

    Attributes:
        policies: the plan at its own multiplier first, then at others far enough to show the Pareto front; each a row
            of format indices per step.
        columns: for each step its distinct candidates, the plan's own first, then those of the nearest multipliers;
            none where none are asked for.
        hedges: other allocations of the same budget, to be judged as whole policies only.
        row_weights: [rows]: factors of the rows of projected errors, as contributions have them.
        contributions: [formats, steps, layers, rows].
        own_errors: [formats, steps, layers]: error of each rounding, as far as its parts are trusted.
        tail_contributions: [steps + 1, rows]: additions of the plan's own steps t … to every projected error.
        tail_own_errors: [steps + 1]: their error by layers and alone, as far as each is trusted.
        tail_bits: [steps + 1, curve]: bits of steps t … at each of several multipliers, cheapest first.
        tail_errors: [steps + 1, curve]: predicted error of the plan's steps before t and that multiplier's from t.
        shrinkage: that predictions are made with.
    """

    policies: tuple[Rows, ...]
    columns: tuple[Rows, ...]
    hedges: tuple[Rows, ...]
    row_weights: Array
    contributions: Array
    own_errors: Array
    tail_contributions: Array
    tail_own_errors: Array
    tail_bits: Array
    tail_errors: Array
    shrinkage: Shrinkage

    def candidates(self, step: int, previous: Assignment | None) -> list[Assignment]:
        """Distinct assignments for one step: the previous one first, because it opens no new bucket."""
        return list(dict.fromkeys([*([previous] if previous is not None else []), *self.columns[step]]))

    def expected_error(self, projected: Array, step: int) -> float:
        """Final error of a path whose error so far is `projected`, if the rest follows the plan.

        Args:
            projected: [rows]: aᵀ δ of the path, scaled as the contributions are.
            step: steps behind the path.
        """
        return self._expected(projected * self.row_weights, 0.0, 0.0, step)

    def predicted_error(self, projected: Array, step: int, assignment: Assignment) -> float:
        """The same after one more step, which has not been made.

        Args:
            projected: [rows]: of the path before that step.
            step: steps behind the path.
            assignment: of the step.
        """
        layers = np.arange(len(assignment))
        added = self.contributions[list(assignment), step, layers].sum(axis=0)
        own = self.own_errors[list(assignment), step, layers].sum()
        return self._expected(projected * self.row_weights, added, own, step + 1)

    def _expected(self, measured: Array, added: Array | float, own: float, step: int) -> float:
        """Final error by the weighted errors of a path so far, what is added to them, and the rest from `step` on."""
        together = np.square(measured + added + self.tail_contributions[step]).sum()
        apart = np.square(measured).sum() + own + self.tail_own_errors[step]
        return float(self.shrinkage.together * together + (1 - self.shrinkage.together) * apart)

    def deviation_error(self, step: int, bits_left: float, own_bits: float) -> float:
        """Estimate what the rest adds or saves with other bits than the plan gives it; infinite when too few.

        Args:
            step: first step of the rest.
            bits_left: bits that the budget leaves for it.
            own_bits: bits that the plan would spend on it.
        """
        bits, errors = self.tail_bits[step], self.tail_errors[step]
        if bits_left < bits[0] - 1e-9:
            return math.inf
        return float(np.interp(bits_left, bits, errors) - np.interp(own_bits, bits, errors))


def most_policies(shrinkages: Sequence[Shrinkage]) -> int:
    """Count the policies and hedges of a plan: its own, those of the front, and one for each shrinkage."""
    return 1 + len(_FRONT) + len(shrinkages)


def make_plan(
    sensitivity: Sensitivity,
    bits: Array,
    budget: float,
    candidates: int,
    shrinkages: Sequence[Shrinkage] = SHRINKAGES,
) -> Plan:
    """Allocate the budget over the trajectory, at its own multiplier and at others.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        budget: mean bits per (step, layer); at least the cheapest format's.
        candidates: distinct assignments per step, as far as there are so many.
        shrinkages: the plan's own, and those of its hedges.
    """
    items, layers = _items(sensitivity, bits), sensitivity.contributions.shape[2]
    total = budget * len(items.layers)
    (own, multiplier), *others = (allocate_jointly(items, total, shrinkage) for shrinkage in shrinkages)
    hedges = [*(choice for choice, _ in others), allocate(items.errors, bits, items.weight, total)]
    cost = np.repeat(bits[:, None], layers, axis=1)
    allocation = Allocation(items, multiplier, own, np.zeros_like(own), shrinkages[0])
    return _complete(sensitivity, allocation, hedges, cost, candidates)


def make_constrained_plan(
    sensitivity: Sensitivity,
    bits: Array,
    budgets: Budgets,
    candidates: int,
    known: Sequence[Rows] = (),
    shrinkages: Sequence[Shrinkage] = SHRINKAGES,
) -> tuple[Plan, Array, Array]:
    """Make a plan under any budgets, and with weights once where these ask for it.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        budgets: to be kept by the plan and its hedges.
        candidates: distinct assignments per step, as far as there are so many.
        known: with weights once, policies whose weights are a start for the choice of them.
        shrinkages: the plan's own, and those of its hedges.

    Returns:
        The plan, then the cost of each format for each layer at one step at the multipliers of the budgets: [formats,
        layers], infinite where the layer does not store the format; a path's bits are counted in it. Last the same cost
        for all formats that the layer may have.

    Raises:
        BudgetError: the budgets cannot be kept together.
    """
    items, layers = _items(sensitivity, bits), sensitivity.contributions.shape[2]
    constraints = Constraints.each(budgets, len(bits), layers)
    sets = choose_stored_sets(accumulated_errors(items), constraints)
    active = sensitivity.active
    starts = [grids_of(constraints, cells_of(np.array(rows), active)) for rows in known]

    def allocated(shrinkage: Shrinkage) -> tuple[Selection, Knapsack]:
        if budgets.once:
            return choose_weights(items, constraints, sets, shrinkage, starts)
        return allocate_within(items, constraints, sets, shrinkage)

    (own, penalty), *others = (allocated(shrinkage) for shrinkage in shrinkages)
    # What a step costs does not depend on the step: each layer's first cell says it.
    _, firsts = np.unique(items.layers, return_index=True)
    cost = penalty.costs[:, firsts]
    # What a path goes on with when it can afford no candidate.
    floor = np.argmin(cost, axis=0)[items.layers]
    hedges = [*(choice for choice, _ in others), sets.chosen]
    plan = _complete(sensitivity, Allocation(penalty, 1.0, own, floor, shrinkages[0]), hedges, cost, candidates)
    prices = constraints.penalty(sets.multipliers)[:, firsts]
    if budgets.allowed is not None:
        prices = np.where(budgets.allowed, prices, np.inf)
    return plan, cost, _at_scale_of(cost, prices)


def _at_scale_of(cost: Array, prices: Array) -> Array:
    """Scale penalties [formats, layers] to `cost`, which has some of them times a common factor."""
    known = np.isfinite(cost) & (prices > 0)
    return prices * (float(cost[known][0] / prices[known][0]) if known.any() else 1.0)


def _items(sensitivity: Sensitivity, bits: Array) -> Knapsack:
    """An item for each (step, layer) where the layer runs."""
    saturated, active = sensitivity.saturated(), sensitivity.active
    contributions, errors = saturated.contributions.double().numpy(), saturated.smoothed_errors().numpy()
    layers = np.flatnonzero(active) % active.shape[1]
    return Knapsack(
        cells_of(contributions, active, axis=1), cells_of(errors, active, axis=1), layers, bits, np.ones(len(layers))
    )


@dataclass(frozen=True)
class Allocation:
    """Allocations that a plan is made from.

    Attributes:
        items: of all cells.
        multiplier: at which they were allocated.
        own: the allocation.
        floor: the cheapest allocation.
        shrinkage: that they were allocated with.
    """

    items: Knapsack
    multiplier: float
    own: Selection
    floor: Selection
    shrinkage: Shrinkage


def _complete(
    sensitivity: Sensitivity, allocation: Allocation, hedges: Sequence[Selection], cost: Array, candidates: int
) -> Plan:
    """Make a plan from its own allocation: candidates, the front and the curves of the rest, at other multipliers.

    Args:
        sensitivity: measured contributions.
        allocation: the plan's own.
        hedges: other allocations of the same budget.
        cost: [formats, layers]: of one step.
        candidates: distinct assignments per step.
    """
    active, own, shrinkage = sensitivity.active, allocation.own, allocation.shrinkage
    layers = active.shape[1]

    def at(multiple: float) -> Selection:
        return coordinate_descent(allocation.items, allocation.multiplier * multiple, shrinkage)

    curve = [*(at(multiple) for multiple in _CURVE), allocation.floor, own]
    policies = tuple(_rows(choice, active) for choice in (own, *(curve[_CURVE.index(m)] for m in _FRONT)))
    chosen = np.stack([spread(choice, active) for choice in (own, *curve)])
    items = allocation.items
    contributions, errors = spread(items.contributions, active, axis=1), spread(items.errors, active, axis=1)
    tails = _Tails.of(contributions, errors, chosen)
    spent = (np.where(active, cost[choice, np.arange(layers)], 0.0) for choice in chosen[1:])
    bits_left = np.stack([_suffix_sums(by_layer.sum(axis=1)) for by_layer in spent])
    return Plan(
        policies,
        _columns(own, at, active, candidates),
        tuple(_rows(choice, active) for choice in hedges),
        sensitivity.row_weights().numpy(),
        contributions,
        error_apart(contributions[..., None, :], errors, shrinkage),
        tails.together[0],
        error_apart(tails.by_layer[0], tails.alone[0], shrinkage),
        *_increasing(bits_left.T, tails.spliced_errors(shrinkage).T),
        shrinkage,
    )


@dataclass(frozen=True)
class _Tails:
    """Contributions and single errors of several policies from each step on; the first is the plan itself.

    Attributes:
        by_layer: [policies, steps + 1, layers, rows]: summed contributions of each layer.
        alone: [policies, steps + 1]: summed single errors.
    """

    by_layer: Array
    alone: Array

    @classmethod
    def of(cls, contributions: Array, errors: Array, chosen: NDArray[np.int64]) -> _Tails:
        """Sum up.

        Args:
            contributions: [formats, steps, layers, rows].
            errors: [formats, steps, layers].
            chosen: [policies, steps, layers].
        """
        added = np.take_along_axis(contributions[None], chosen[:, None, :, :, None], 1)[:, 0]
        alone = np.take_along_axis(errors[None], chosen[:, None], 1)[:, 0].sum(axis=2)
        return cls(np.stack([_suffix_sums(a) for a in added]), np.stack([_suffix_sums(a) for a in alone]))

    @property
    def together(self) -> Array:
        """[policies, steps + 1, rows]: summed contributions of all layers."""
        summed: Array = self.by_layer.sum(axis=2)
        return summed

    def spliced_errors(self, shrinkage: Shrinkage) -> Array:
        """[policies - 1, steps + 1]: predicted error of the plan's steps before t and another's from t."""
        together = np.square(self.together[0, :1] - self.together[0] + self.together[1:]).sum(axis=-1)
        by_layer = self.by_layer[0, :1] - self.by_layer[0] + self.by_layer[1:]
        apart = error_apart(by_layer, self.alone[0, 0] - self.alone[0] + self.alone[1:], shrinkage)
        spliced: Array = shrinkage.together * together + (1 - shrinkage.together) * apart
        return spliced


def error_apart(by_layer: Array, alone: Array, shrinkage: Shrinkage) -> Array:
    """Combine accumulation within layers [..., layers, rows] and single errors [...]: [...]."""
    layered = shrinkage.layered
    error: Array = layered * np.square(by_layer).sum(axis=(-2, -1)) + (1 - layered) * alone
    return error


def _increasing(bits: Array, errors: Array) -> tuple[Array, Array]:
    """Sort each step's curve by bits and make its error never rise with bits: [steps + 1, curve] each."""
    order = np.argsort(bits, axis=1, kind="stable")
    bits, errors = np.take_along_axis(bits, order, 1), np.take_along_axis(errors, order, 1)
    return bits, np.minimum.accumulate(errors, axis=1)


def _columns(own: Selection, at: Callable[[float], Selection], active: Active, count: int) -> tuple[Rows, ...]:
    """For each step the first `count` distinct rows, going outwards from the plan's multiplier."""
    columns: list[dict[Assignment, None]] = [{row: None} for row in _rows(own, active)]
    for multiple in _outwards():
        if all(len(column) >= count for column in columns):
            break
        for column, row in zip(columns, _rows(at(multiple), active), strict=True):
            column[row] = None
    return tuple(tuple(column)[:count] for column in columns)


def _outwards() -> Iterator[float]:
    for power in range(1, _PRICE_STEPS + 1):
        yield _PRICE_STEP**power
        yield _PRICE_STEP**-power


def _rows(choice: Selection, active: Active) -> Rows:
    return rows_of(spread(choice, active), active)


def _suffix_sums(rows: Array) -> Array:
    """[steps, …] → [steps + 1, …]: row t is the sum of rows t …; the last is zero."""
    sums = np.cumsum(rows[::-1], axis=0)[::-1]
    return np.concatenate([sums, np.zeros((1, *rows.shape[1:]))])

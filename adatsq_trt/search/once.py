"""Weights once: one weight grid for each layer, chosen together with the activations of all steps.

A layer has one grid for the whole trajectory and at every step a format of that grid, so what a grid is worth depends
on the activations that its steps can afford beside it. At given multipliers (see `lagrangian`) the error model of
`joint` couples layers only through its share `together`. So

1. start from some grids: those of the relaxation, or of a policy that is known;
2. find the scale of the multipliers at which the best formats within these grids keep every budget;
3. at these multipliers give every layer in turn the grid that is best for it: for each grid its steps take their best
   formats, by coordinate descent within the layer, while all other layers stay as they are;
4. go on at 2 with the new grids, as long as the predicted error falls.

Of several starts the least predicted error is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.candidates import Array
from adatsq_trt.search.descent import descent_pass
from adatsq_trt.search.joint import SWEEPS, Knapsack, Selection, Shrinkage, predicted_error
from adatsq_trt.search.lagrangian import Constraints, StoredSets, allocate_at_scale

_ROUNDS = 4
Grids = NDArray[np.int64]  # [groups]: the grid of each


@dataclass(frozen=True)
class _Chosen:
    """An allocation with one grid for each group.

    Attributes:
        sets: its grids, and the multipliers.
        formats: [items].
        scale: factor of the multipliers that led to these formats.
        error: predicted.
    """

    sets: StoredSets
    formats: Selection
    scale: float
    error: float


def choose_weights(
    items: Knapsack, constraints: Constraints, relaxed: StoredSets, shrinkage: Shrinkage, known: Sequence[Grids] = ()
) -> tuple[Selection, Knapsack]:
    """Search for the grids and formats with the least predicted error within every budget.

    Args:
        items: one for each (step, group).
        constraints: the budgets, with one grid for each group.
        relaxed: solution of the relaxation.
        shrinkage: see `joint`.
        known: grids of other policies to start from.

    Returns:
        As `allocate_within`.
    """
    starts = [grids_of(constraints, relaxed.chosen), *known]
    distinct = list({grids.tobytes(): grids for grids in starts}.values())
    found = [_improve(items, constraints, relaxed, shrinkage, grids) for grids in distinct]
    # The relaxation's own grids keep the budgets, so there is one.
    best = min((chosen for chosen in found if chosen is not None), key=lambda chosen: chosen.error)
    cost = np.where(best.sets.allowed, constraints.penalty(best.sets.multipliers), np.inf) * best.scale
    return best.formats, replace(items, cost=cost)


def grids_of(constraints: Constraints, chosen: Selection) -> Grids:
    """The grid of each group of a choice [items] that has one for each."""
    grids: Grids = np.zeros(constraints.bytes.shape[1], dtype=np.int64)
    grids[constraints.groups] = constraints.grids[chosen]
    return grids


def _improve(
    items: Knapsack, constraints: Constraints, relaxed: StoredSets, shrinkage: Shrinkage, grids: Grids
) -> _Chosen | None:
    """Rules 2 to 4 from some grids; None where these keep the budgets with no formats."""
    best: _Chosen | None = None
    for _ in range(_ROUNDS):
        chosen = _within(items, constraints, relaxed, shrinkage, grids)
        if chosen is None or (best is not None and chosen.error >= best.error):
            break
        best = chosen
        others = _best_grids(items, constraints, chosen, shrinkage)
        if (others == grids).all():
            break
        grids = others
    return best


def _within(
    items: Knapsack, constraints: Constraints, relaxed: StoredSets, shrinkage: Shrinkage, grids: Grids
) -> _Chosen | None:
    """The best formats within some grids; None where even the cheapest break a budget."""
    allowed = constraints.members(grids)
    cheapest = np.argmin(np.where(allowed, constraints.penalty(relaxed.multipliers), np.inf), axis=0)
    fallback = relaxed.chosen if allowed[relaxed.chosen, np.arange(len(relaxed.chosen))].all() else cheapest
    if not constraints.holds(fallback):
        return None
    sets = StoredSets(relaxed.multipliers, allowed, fallback)
    formats, scale = allocate_at_scale(items, constraints, sets, shrinkage)
    return _Chosen(sets, formats, scale, predicted_error(items, formats, shrinkage))


def _best_grids(items: Knapsack, constraints: Constraints, chosen: _Chosen, shrinkage: Shrinkage) -> Grids:
    """Choose for every group the grid that is best at the multipliers of an allocation: rule 3.

    Args:
        items: the knapsack problem.
        constraints: the budgets.
        chosen: the allocation.
        shrinkage: see `joint`.
    """
    grids = grids_of(constraints, chosen.formats)
    multipliers = chosen.sets.multipliers * chosen.scale
    everything = np.ones_like(items.errors, dtype=bool)
    penalty = np.where(constraints.among(everything), constraints.penalty(multipliers), np.inf)
    bytes_penalty = constraints.bytes * multipliers[-1]
    total = items.contributions[chosen.formats, np.arange(len(items.layers))].sum(axis=0)
    for group in range(constraints.bytes.shape[1]):
        own = np.flatnonzero(constraints.groups == group)
        now = items.contributions[chosen.formats[own], own].sum(axis=0)
        trials = [
            _group_trial(items, penalty, own, np.flatnonzero(constraints.grids == grid), total - now, shrinkage)
            for grid in range(len(constraints.bytes))
        ]
        costs = [cost + bytes_penalty[grid, group] for grid, (cost, _) in enumerate(trials)]
        grids[group] = int(np.argmin(costs))
        total = total - now + trials[grids[group]][1]
    return grids


def _group_trial(
    items: Knapsack,
    penalty: Array,
    own: NDArray[np.int64],
    formats: NDArray[np.int64],
    rest: Array,
    shrinkage: Shrinkage,
) -> tuple[float, Array]:
    """Compute a group's cost with the best formats of one grid at its items, and its contributions [rows].

    Args:
        items: of all groups.
        penalty: [formats, items].
        own: the group's items.
        formats: of one grid.
        rest: [rows]: contributions of all other groups.
        shrinkage: see `joint`.
    """
    cell = np.ix_(formats, own)
    contributions = np.ascontiguousarray(items.contributions[cell].swapaxes(0, 1))
    fixed = np.ascontiguousarray((shrinkage.alone * items.errors[cell] + penalty[cell]).T)
    places = np.arange(len(own))
    chosen = np.argmin(items.errors[cell] + penalty[cell], axis=0)
    within = contributions[places, chosen].sum(axis=0)[None]
    total, layers = rest + within[0], np.zeros(len(own), dtype=np.int64)
    for _ in range(SWEEPS):
        if not descent_pass(
            contributions, fixed, layers, places, shrinkage.together, shrinkage.by_layer, chosen, total, within
        ):
            break
    cost = shrinkage.together * np.square(total).sum() + shrinkage.by_layer * np.square(within).sum()
    return float(cost + fixed[places, chosen].sum()), within[0]

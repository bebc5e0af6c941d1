"""Policies that a timestep-aware search has to beat: uniform, layer-only and time-only.

Layer-only: the same assignment at every step. Time-only: the same format for all layers of a step. Both are found with
the same measured contributions as the search's own candidates and get the same treatment afterwards: several
proposals, the best on whole generated samples wins.
"""

from __future__ import annotations

import numpy as np
import torch

from adatsq_trt.errors import BudgetError
from adatsq_trt.search.active import Active, rows_of
from adatsq_trt.search.budgets import Budgets
from adatsq_trt.search.candidates import Array, Assignment, allocate
from adatsq_trt.search.joint import Knapsack, allocate_jointly
from adatsq_trt.search.lagrangian import Constraints, allocate_within, choose_stored_sets
from adatsq_trt.search.plan import SHRINKAGES, Rows
from adatsq_trt.search.sensitivity import Sensitivity

# Proposals of a kind: with each shrinkage, and one without.
MOST_PROPOSALS = 1 + len(SHRINKAGES)


def uniform(index: int, steps: int, layers: int, cells: Active | None = None) -> Rows:
    """One format everywhere; in `cells` [steps, layers] where these are given."""
    active = np.ones((steps, layers), dtype=bool) if cells is None else cells
    return rows_of(np.full(active.shape, index), active)


def layer_only(sensitivity: Sensitivity, bits: Array, budget: float) -> list[Rows]:
    """Proposals with one assignment for all steps.

    Layers are allocated jointly, as the search's own plan is, with each shrinkage; and one by one, a layer's error
    being the geometric mean of that with and without accumulation over the steps (better than either alone).
    """
    active = sensitivity.active
    rows = _grouped(sensitivity, bits, budget, steps_together=True)
    return [rows_of(np.array([row]), active) for row in rows]


def time_only(sensitivity: Sensitivity, bits: Array, budget: float) -> list[Rows]:
    """Proposals with one format for all layers of a step."""
    rows = _grouped(sensitivity, bits, budget, steps_together=False)
    return [rows_of(np.array(row)[:, None], sensitivity.active) for row in rows]


def constrained_layer_only(sensitivity: Sensitivity, bits: Array, budgets: Budgets) -> list[Rows]:
    """`layer_only` under any budgets; none when no such policy keeps them."""
    constraints = Constraints.by_layer(budgets, len(bits), sensitivity.contributions.shape[2])
    rows = _grouped_within(sensitivity, bits, constraints, steps_together=True)
    return [rows_of(np.array([row]), sensitivity.active) for row in rows]


def constrained_time_only(sensitivity: Sensitivity, bits: Array, budgets: Budgets) -> list[Rows]:
    """`time_only` under any budgets; none when no such policy keeps them.

    With weights once there are proposals for every weight grid.
    """
    layers, storage = sensitivity.contributions.shape[2], budgets.storage
    if storage is None or not storage.once:
        among = [np.arange(len(bits))]
    else:
        among = [np.flatnonzero(storage.grids == grid) for grid in range(len(storage.bytes))]
    found = []
    for formats in among:
        own = sensitivity if len(among) == 1 else sensitivity.of_formats(formats.tolist())
        constraints = Constraints.by_step(budgets.of_formats(formats), len(formats), layers)
        rows = _grouped_within(own, bits[formats], constraints, steps_together=False)
        found += [rows_of(formats[list(row)][:, None], sensitivity.active) for row in rows]
    return found


def _grouped_within(
    sensitivity: Sensitivity, bits: Array, constraints: Constraints, *, steps_together: bool
) -> list[Assignment]:
    contributions, axis = sensitivity.saturated().contributions.double(), 1 if steps_together else 2
    together = contributions.sum(dim=axis)
    layers = np.arange(together.shape[1]) if steps_together else np.zeros(together.shape[1], dtype=np.int64)
    items = Knapsack(together.numpy(), together.square().sum(dim=-1).numpy(), layers, bits, np.ones(together.shape[1]))
    try:
        sets = choose_stored_sets(items.errors, constraints)
    except BudgetError:
        return []
    choices = [sets.chosen, *(allocate_within(items, constraints, sets, shrinkage)[0] for shrinkage in SHRINKAGES)]
    return list(dict.fromkeys(tuple(int(i) for i in choice) for choice in choices if constraints.holds(choice)))


def _grouped(sensitivity: Sensitivity, bits: Array, budget: float, *, steps_together: bool) -> list[Assignment]:
    """Allocate one format per layer (or per step) within a mean budget; distinct proposals."""
    contributions, axis = sensitivity.saturated().contributions.double(), 1 if steps_together else 2
    together = contributions.sum(dim=axis)
    diagonal, alone = together.square().sum(dim=-1), contributions.square().sum(dim=(axis, 3))
    items = together.shape[1]
    weight = sensitivity.active.mean(axis=axis - 1)  # of an expert's layers, a part of the steps
    total = budget * float(weight.sum())
    choices = [allocate(torch.sqrt(diagonal * alone).numpy(), bits, weight, total)]
    layers = np.arange(items) if steps_together else np.zeros(items, dtype=np.int64)
    problem = Knapsack(together.numpy(), diagonal.numpy(), layers, bits, weight)
    choices += [allocate_jointly(problem, total, shrinkage)[0] for shrinkage in SHRINKAGES]
    return list(dict.fromkeys(tuple(int(i) for i in choice) for choice in choices))

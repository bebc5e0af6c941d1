"""Allocation under several budgets at once, one of which, bytes, does not add up over steps.

Every unit has a multiplier μ. At given multipliers a layer's set S of stored weight formats is worth

    value(l, S) = Σ_t min_{f in S} (error[f, t, l] + μ_bits bits[f] + μ_ms ms[f, l]) + μ_bytes bytes(l, S),

so each layer takes the best of its few sets exactly, by enumeration: this is the Lagrangian relaxation, in which layers
no longer depend on each other. Multipliers rise one after the other until each budget is kept. Within the sets that
come out, which keep the bytes whatever the steps do, formats are allocated jointly (`joint`), at the same ratio of
multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.errors import BudgetError
from adatsq_trt.search.active import parts
from adatsq_trt.search.budgets import Budgets
from adatsq_trt.search.candidates import Array
from adatsq_trt.search.joint import Knapsack, Selection, Shrinkage, coordinate_descent

_ROUNDS, _BISECTIONS = 6, 40
_RELATIVE = 1e-12  # the lowest multiplier that is tried, of the highest


@dataclass(frozen=True)
class Constraints:
    """Budgets, as costs and limits of the items of a knapsack problem.

    Attributes:
        costs: for each additive budget [formats, items].
        limits: of these budgets.
        groups: [items]: whose stored weights an item uses.
        grids: [formats]: the stored weight of a format.
        bytes: [grids, groups]; zeros without a budget in bytes.
        most_bytes: the budget in bytes; infinite without one.
        once: whether a group stores one grid.
        allowed: [formats, items]: whether an item may be given a format; None where every one may.
    """

    costs: tuple[Array, ...]
    limits: tuple[float, ...]
    groups: NDArray[np.int64]
    grids: NDArray[np.int64]
    bytes: Array
    most_bytes: float
    once: bool = False
    allowed: NDArray[np.bool_] | None = None

    @classmethod
    def each(cls, budgets: Budgets, formats: int, layers: int) -> Constraints:
        """An item for each (step, layer) where the layer runs, in this order."""
        groups = np.flatnonzero(budgets.active(layers)) % layers
        costs = tuple(item.cost[:, groups] for item in budgets.additive)
        constraints = cls._make(budgets, costs, groups, formats, layers)
        allowed = constraints.allowed
        return constraints if allowed is None else replace(constraints, allowed=allowed[:, groups])

    @classmethod
    def by_layer(cls, budgets: Budgets, formats: int, layers: int) -> Constraints:
        """An item for each layer: the same format at all steps."""
        costs = tuple(item.cost * budgets.active(layers).sum(axis=0) for item in budgets.additive)
        return cls._make(budgets, costs, np.arange(layers), formats, layers)

    @classmethod
    def by_step(cls, budgets: Budgets, formats: int, layers: int) -> Constraints:
        """An item for each step: the same format for all layers that run; steps of one expert store the same."""
        active, groups = budgets.active(layers), np.zeros(budgets.steps, dtype=np.int64)
        experts = list(parts(active))
        for number, (steps, _) in enumerate(experts):
            groups[steps] = number
        costs = tuple(item.cost @ active.T for item in budgets.additive)
        constraints = cls._make(budgets, costs, groups, formats, layers)
        stored = np.stack([constraints.bytes[:, own].sum(axis=1) for _, own in experts], axis=1)
        allowed = constraints.allowed
        if allowed is not None:
            allowed = np.stack([allowed[:, own].all(axis=1) for _, own in experts], axis=1)[:, groups]
        return replace(constraints, bytes=stored, allowed=allowed)

    @classmethod
    def grouped(cls, budgets: Budgets, items: Knapsack) -> Constraints:
        """An item for each (group of steps, layer); `items.weight` counts the group's steps."""
        formats, layers = len(items.bits), int(items.layers.max()) + 1
        costs = tuple(item.cost[:, items.layers] * items.weight for item in budgets.additive)
        constraints = cls._make(budgets, costs, items.layers, formats, layers)
        allowed = constraints.allowed
        return constraints if allowed is None else replace(constraints, allowed=allowed[:, items.layers])

    @classmethod
    def _make(
        cls, budgets: Budgets, costs: tuple[Array, ...], groups: NDArray[np.int64], formats: int, layers: int
    ) -> Constraints:
        limits, storage = tuple(item.limit for item in budgets.additive), budgets.storage
        if storage is None:
            own = (np.arange(formats), np.zeros((formats, layers)), np.inf, False)
        else:
            own = (storage.grids, storage.bytes, storage.limit, storage.once)
        return cls(costs, limits, groups, *own, budgets.allowed)

    def penalty(self, multipliers: Array) -> Array:
        """[formats, items]: what the additive costs are worth."""
        total = np.zeros((len(self.grids), len(self.groups)))
        for multiplier, cost in zip(multipliers, self.costs, strict=False):
            total += multiplier * cost
        return total

    def used(self, chosen: Selection) -> Array:
        """Add up the costs of a selection: of each additive budget and, last, in bytes."""
        places = np.arange(len(chosen))
        present = np.zeros_like(self.bytes, dtype=bool)
        present[self.grids[chosen], self.groups] = True
        return np.array([*(cost[chosen, places].sum() for cost in self.costs), (self.bytes * present).sum()])

    def holds(self, chosen: Selection) -> bool:
        """Whether a choice keeps every budget, one grid of each group where it may have no more, and its formats."""
        if self.once and not self._one_grid(chosen):
            return False
        if self.allowed is not None and not self.allowed[chosen, np.arange(len(chosen))].all():
            return False
        most = np.array([*self.limits, self.most_bytes])
        return bool((self.used(chosen) <= most * (1 + 1e-9)).all())

    def _one_grid(self, chosen: Selection) -> bool:
        own = np.zeros(self.bytes.shape[1], dtype=np.int64)
        own[self.groups] = self.grids[chosen]
        return bool((own[self.groups] == self.grids[chosen]).all())

    def members(self, which: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[formats, items]: the allowed formats of each group's one grid [groups]."""
        return self.among(self.grids[:, None] == which[self.groups])

    def among(self, formats: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[formats, items]: those of some formats that items may be given."""
        return formats if self.allowed is None else formats & self.allowed


def accumulated_errors(items: Knapsack) -> Array:
    """[formats, items]: single errors, scaled so that half of each is a share of what its layer accumulates.

    A format that a layer keeps at all steps errs the same way at each; the relaxation, which looks at single errors,
    would not see that.
    """
    groups = items.layers.max(initial=0) + 1
    result = np.empty_like(items.errors)
    for fmt, contributions in enumerate(items.contributions):
        summed = np.zeros((groups, contributions.shape[1]))
        np.add.at(summed, items.layers, contributions)
        single = np.bincount(items.layers, weights=items.errors[fmt], minlength=groups)
        ratio = np.square(summed).sum(axis=1) / np.maximum(single, np.finfo(np.float64).tiny)
        result[fmt] = items.errors[fmt] * (1 + ratio[items.layers]) / 2
    return result


@dataclass(frozen=True)
class StoredSets:
    """The stored formats of every group.

    Attributes:
        multipliers: of the additive budgets and, last, of bytes.
        allowed: [formats, items].
        chosen: [items]: the best formats if errors were single; they keep every budget.
    """

    multipliers: Array
    allowed: NDArray[np.bool_]
    chosen: Selection


def choose_stored_sets(errors: Array, constraints: Constraints) -> StoredSets:
    """Multipliers at which every budget is kept, and the formats that each group stores.

    Args:
        errors: [formats, items].
        constraints: the budgets.

    Raises:
        BudgetError: the budgets cannot be kept together.
    """
    relaxed = _Relaxation(errors, constraints)
    most = np.array([*constraints.limits, constraints.most_bytes])
    multipliers = np.zeros(len(most))
    for _ in range(_ROUNDS):
        for unit in range(len(most)):
            if np.isfinite(most[unit]):
                multipliers[unit] = relaxed.least_multiplier(multipliers, unit, most[unit])
        sets = relaxed.solve(multipliers)
        if constraints.holds(sets.chosen):
            return relaxed.spend_bytes(sets)
    for _ in range(60):  # the units pull in different directions: all multipliers together
        multipliers = np.where(np.isfinite(most), np.maximum(multipliers * 2, relaxed.highest * _RELATIVE), 0.0)
        sets = relaxed.solve(multipliers)
        if constraints.holds(sets.chosen):
            return relaxed.spend_bytes(sets)
    uniform = relaxed.uniform(multipliers)
    if uniform is not None:
        return uniform
    raise BudgetError(
        "no policy was found that keeps all budgets at once, although each can be kept alone; raise one of them or add "
        "a format"
    )


class _Relaxation:
    """The Lagrangian relaxation: enumerates the sets of stored formats of each group."""

    def __init__(self, errors: Array, constraints: Constraints) -> None:
        self.errors, self.constraints = errors, constraints
        grids = len(constraints.bytes)
        if constraints.once:
            self.masks = list(np.eye(grids, dtype=bool))
        elif np.isfinite(constraints.most_bytes):
            self.masks = [np.array(mask) for mask in product((False, True), repeat=grids) if any(mask)]
        else:  # every format is at hand
            self.masks = [np.ones(grids, dtype=bool)]
        self.members = [mask[constraints.grids] for mask in self.masks]  # [formats]
        self.bytes = np.stack(
            [(constraints.bytes * mask[:, None]).sum(axis=0) for mask in self.masks]
        )  # [sets, groups]
        smallest = [np.diff(np.unique(cost)).min(initial=np.inf) for cost in constraints.costs] + [
            np.diff(np.unique(self.bytes)).min(initial=np.inf)
        ]
        steps = np.array([s if np.isfinite(s) and s > 0 else 1.0 for s in smallest])
        self.highest = 8 * float(errors.sum()) / steps + 1e-30

    def values(self, multipliers: Array) -> Array:
        """[sets, groups]: error and additive costs, without bytes."""
        total, groups = self.errors + self.constraints.penalty(multipliers), self.bytes.shape[1]
        among = self.constraints.among
        best = [np.where(among(members[:, None]), total, np.inf).min(axis=0) for members in self.members]
        return np.stack([np.bincount(self.constraints.groups, weights=row, minlength=groups) for row in best])

    def solve(self, multipliers: Array) -> StoredSets:
        """The best sets and formats at some multipliers."""
        return self._with_sets(multipliers, np.argmin(self.values(multipliers) + multipliers[-1] * self.bytes, axis=0))

    def _with_sets(self, multipliers: Array, which: NDArray[np.int64]) -> StoredSets:
        """The best formats within a set for each group [groups]."""
        allowed = self.constraints.among(np.stack(self.members)[which][self.constraints.groups].T)
        total = np.where(allowed, self.errors + self.constraints.penalty(multipliers), np.inf)
        return StoredSets(multipliers, allowed, np.argmin(total, axis=0))

    def uniform(self, multipliers: Array) -> StoredSets | None:
        """The weights of a format that keeps every budget everywhere, where multipliers find nothing."""
        for fmt, grid in enumerate(self.constraints.grids):
            chosen = np.full(self.errors.shape[1], fmt)
            if self.constraints.holds(chosen):
                which = np.full(self.bytes.shape[1], grid)
                return StoredSets(multipliers, self.constraints.members(which), chosen)
        return None

    def least_multiplier(self, multipliers: Array, unit: int, most: float) -> float:
        """The lowest multiplier of a unit, among the others, at which its budget is kept."""

        def kept(multiplier: float) -> bool:
            trial = multipliers.copy()
            trial[unit] = multiplier
            return bool(self.constraints.used(self.solve(trial).chosen)[unit] <= most * (1 + 1e-9))

        if kept(0.0):
            return 0.0
        high = float(self.highest[unit])
        low = high * _RELATIVE
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if kept(middle) else (middle, high)
        return high

    def spend_bytes(self, sets: StoredSets) -> StoredSets:
        """Larger sets where they save most error per byte, while they fit: a multiplier alone leaves some unspent."""
        if not np.isfinite(self.constraints.most_bytes):
            return sets
        values, groups = self.values(sets.multipliers), self.bytes.shape[1]
        which = np.argmin(values + sets.multipliers[-1] * self.bytes, axis=0)
        everywhere, left = np.arange(groups), self.constraints.most_bytes - self.bytes[which, np.arange(groups)].sum()
        while True:
            cost, saved = self.bytes - self.bytes[which, everywhere], values[which, everywhere] - values
            fits = (cost > 0) & (cost <= left) & (saved > 0)
            if not fits.any():
                return sets
            ratio = np.where(fits, saved / np.where(fits, cost, 1.0), -np.inf)
            chosen, group = np.unravel_index(int(ratio.argmax()), ratio.shape)
            left -= cost[chosen, group]
            which[group] = chosen
            trial = self._with_sets(sets.multipliers, which)
            # With more to choose from, a layer may cost more of another budget: joint allocation sees to that.
            if not self.constraints.holds(trial.chosen):
                return sets
            sets = trial


def allocate_within(
    items: Knapsack, constraints: Constraints, sets: StoredSets, shrinkage: Shrinkage
) -> tuple[Selection, Knapsack]:
    """Choose formats within the stored sets jointly.

    Args:
        items: the knapsack problem; its bits and weights are not looked at.
        constraints: the budgets.
        sets: formats that each group stores, and the multipliers.
        shrinkage: see `joint`.

    Returns:
        The selection, and the items with the cost with which it was made, at a multiplier of 1.
    """
    chosen, scale = allocate_at_scale(items, constraints, sets, shrinkage)
    return chosen, replace(items, cost=_cost(constraints, sets) * scale)


def _cost(constraints: Constraints, sets: StoredSets) -> Array:
    """[formats, items]: infinite where a group does not store the format."""
    return np.where(sets.allowed, constraints.penalty(sets.multipliers), np.inf)


def allocate_at_scale(
    items: Knapsack, constraints: Constraints, sets: StoredSets, shrinkage: Shrinkage
) -> tuple[Selection, float]:
    """`allocate_within`: the selection, and the factor of the multipliers that led to it."""
    priced = replace(items, cost=_cost(constraints, sets))
    if not sets.multipliers[:-1].any():
        return coordinate_descent(priced, 1.0, shrinkage), 1.0
    low, high, best, scale = 1e-3, 1e3, sets.chosen, 1.0
    for _ in range(16):
        middle = float(np.sqrt(low * high))
        trial = coordinate_descent(priced, middle, shrinkage)
        if constraints.holds(trial):
            best, scale, high = trial, middle, middle
        else:
            low = middle
    return spend(items.errors, constraints, sets.allowed, best), scale


def allocate_groups(items: Knapsack, budgets: Budgets, cost: Array, shrinkage: Shrinkage) -> Selection | None:
    """Formats of groups of steps within the stored formats of a plan, at the ratio of its multipliers.

    Args:
        items: one for each (group, layer), in this order; `weight` counts the group's steps.
        budgets: of all steps.
        cost: of one step at those multipliers: [formats, layers], infinite where a layer does not store a format.
        shrinkage: see `joint`.

    Returns:
        None where no common factor of the multipliers keeps every budget.
    """
    constraints = Constraints.grouped(budgets, items)
    prices = cost[:, items.layers] * items.weight
    priced = replace(items, cost=prices)

    def trial(factor: float) -> Selection | None:
        chosen = coordinate_descent(priced, factor, shrinkage)
        return chosen if constraints.holds(chosen) else None

    low, high = 1e-3, 1e3
    best = trial(high)
    if best is None:
        return None
    for _ in range(16):
        middle = float(np.sqrt(low * high))
        kept = trial(middle)
        if kept is None:
            low = middle
        else:
            best, high = kept, middle
    spent = spend(items.errors, constraints, np.isfinite(prices), best)
    return spent if constraints.holds(spent) else best  # all formats at once may be more bytes than there are


def spend(errors: Array, constraints: Constraints, allowed: NDArray[np.bool_], chosen: Selection) -> Selection:
    """Single upgrades within the stored sets, those first that save most error for their part of the budgets."""
    chosen, places = chosen.copy(), np.arange(errors.shape[1])
    left = np.array(constraints.limits) - constraints.used(chosen)[:-1]
    while True:
        saved = errors[chosen, places] - errors
        costs = [cost - cost[chosen, places] for cost in constraints.costs]
        fits = allowed & (saved > 0)
        for cost, rest in zip(costs, left, strict=True):
            fits &= cost <= rest
        if not fits.any():
            return chosen
        relative = sum((np.maximum(c, 0) / limit for c, limit in zip(costs, constraints.limits, strict=True)), 1e-12)
        ratio = np.where(fits, saved / relative, -np.inf)
        fmt, item = np.unravel_index(int(ratio.argmax()), ratio.shape)
        left -= np.array([cost[fmt, item] for cost in costs])
        chosen[item] = fmt

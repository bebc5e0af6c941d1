"""Few assignments: steps share them, since each distinct one is an engine in most layouts.

A policy of the search changes its assignment at nearly every step, because that is free for the error. Here the steps
of a policy are put into at most so many groups, with the error model that the plan is made with (see `joint`):

1. Steps with equal rows are a group.
2. While there are too many, the two groups are joined whose union costs least, when every layer takes the format with
   the least error + multiplier · cost and everything else stays as it is.
3. Each step moves to the group whose assignment suits it best (k-means, with the model's error as the distance).
4. The groups' assignments are allocated anew within the budgets: an item for each (group, layer). Where stored weights
   are limited, every layer keeps the weight formats that it has in the policy.

3 and 4 are repeated. What the model proposes is measured on whole samples afterwards, as every other policy is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.active import Active, cells_of, spread
from adatsq_trt.search.budgets import Budgets
from adatsq_trt.search.candidates import Array
from adatsq_trt.search.joint import Knapsack, Selection, Shrinkage, allocate_jointly
from adatsq_trt.search.lagrangian import allocate_groups
from adatsq_trt.search.plan import SHRINKAGES, Rows
from adatsq_trt.search.sensitivity import Sensitivity

_ROUNDS, _SKETCH = 4, 64
Labels = NDArray[np.int64]


class Allowance(Protocol):
    """Budgets of a policy whose steps share assignments."""

    def for_start(self, rows: Rows) -> Allowance:
        """The same where layers store what they store in a policy, if that is limited."""

    def prices(self, items: Knapsack, shrinkage: Shrinkage) -> Array:
        """Compute the cost of each format for each layer at one step, in units of error: [formats, layers].

        Infinite where a layer may not be given a format.

        Args:
            items: of all steps.
            shrinkage: see `joint`.
        """

    def holds(self, rows: Rows) -> bool:
        """Whether a policy keeps it."""

    def allocate(self, items: Knapsack, shrinkage: Shrinkage) -> Selection | None:
        """Formats of every (group, layer), or None where none are found; `items.weight` counts a group's steps."""


@dataclass(frozen=True)
class MeanBits:
    """Bits alone.

    Attributes:
        bits: [formats], ascending.
        total: a budget as a sum over (step, layer).
        cells: [steps, layers]: which layers run at which step; None for all.
    """

    bits: Array
    total: float
    cells: Active | None = None

    def for_start(self, rows: Rows) -> MeanBits:
        """Itself."""
        return self

    def prices(self, items: Knapsack, shrinkage: Shrinkage) -> Array:
        """Multiply bits by the multiplier at which a policy without a limit just meets the budget."""
        multiplier = allocate_jointly(items, self.total, shrinkage)[1]
        return np.repeat(multiplier * self.bits[:, None], items.layers.max() + 1, axis=1)

    def holds(self, rows: Rows) -> bool:
        """Whether the sum is kept."""
        bits = self.bits[np.asarray(rows)]
        return bool((bits if self.cells is None else bits[self.cells]).sum() <= self.total + 1e-9)

    def allocate(self, items: Knapsack, shrinkage: Shrinkage) -> Selection | None:
        """The cheapest format everywhere always keeps it."""
        return allocate_jointly(items, self.total, shrinkage)[0]


@dataclass(frozen=True)
class Several:
    """Any budgets.

    Attributes:
        budgets: all of them.
        cost: of one step at a plan's multipliers: [formats, layers], infinite where a layer may not be given a format.
    """

    budgets: Budgets
    cost: Array

    def for_start(self, rows: Rows) -> Several:
        """Within the weight formats that the policy stores of each layer."""
        storage = self.budgets.storage
        if storage is None:
            return self
        stored = storage.stored(np.asarray(rows))
        return Several(self.budgets, np.where(stored[storage.grids], self.cost, np.inf))

    def prices(self, items: Knapsack, shrinkage: Shrinkage) -> Array:
        """The plan's."""
        return self.cost

    def holds(self, rows: Rows) -> bool:
        """Whether every budget is kept."""
        return self.budgets.holds(rows)

    def allocate(self, items: Knapsack, shrinkage: Shrinkage) -> Selection | None:
        """At the plan's ratio of multipliers."""
        return allocate_groups(items, self.budgets, self.cost, shrinkage)


@dataclass(frozen=True)
class ErrorModel:
    """The predicted error of a whole policy (see `joint`), and what it may spend.

    Attributes:
        contributions: [formats, steps, layers, rows].
        errors: [formats, steps, layers]: single errors.
        bits: [formats], ascending.
        allowance: budgets of the policy.
        prices: [formats, layers]: of one step, in units of error.
        shrinkage: in covariances.
        active: [steps, layers]: which layers run at which step.
    """

    contributions: Array
    errors: Array
    bits: Array
    allowance: Allowance
    prices: Array
    shrinkage: Shrinkage
    active: Active

    @classmethod
    def of(cls, sensitivity: Sensitivity, bits: Array, allowance: Allowance, shrinkage: Shrinkage) -> ErrorModel:
        """The model that the plan uses."""
        saturated, active = sensitivity.saturated(), sensitivity.active
        contributions, errors = saturated.contributions.double().numpy(), saturated.smoothed_errors().numpy()
        items = _items(contributions, errors, bits, np.arange(errors.shape[1]), active)
        return cls(contributions, errors, bits, allowance, allowance.prices(items, shrinkage), shrinkage, active)

    def for_start(self, rows: Rows) -> ErrorModel:
        """The same for policies that are made from one."""
        allowance = self.allowance.for_start(rows)
        if allowance is self.allowance:
            return self
        items = _items(self.contributions, self.errors, self.bits, np.arange(self.errors.shape[1]), self.active)
        return replace(self, allowance=allowance, prices=allowance.prices(items, self.shrinkage))

    @cached_property
    def sketch(self) -> Array:
        """The contributions with fewer rows, whose squares sum to about the same: [formats, steps, layers, sketch].

        A random projection (Johnson and Lindenstrauss): joining looks at hundreds of unions, and is only a start.
        """
        rows = self.contributions.shape[-1]
        if rows <= _SKETCH:
            return self.contributions
        projection = np.random.default_rng(0).standard_normal((rows, _SKETCH)) / np.sqrt(_SKETCH)
        projected: Array = self.contributions @ projection
        return projected

    def error(self, chosen: Labels) -> float:
        """Predicted latent MSE of a policy, [steps, layers] format indices."""
        picked, alone = self.picked(chosen)
        return self._error(picked.sum(axis=0), alone.sum())

    def picked(self, chosen: Labels) -> tuple[Array, Array]:
        """Pick the chosen formats' contributions: [steps, layers, rows], and single errors: [steps, layers]."""
        contributions = np.take_along_axis(self.contributions, chosen[None, :, :, None], 0)[0]
        return contributions, np.take_along_axis(self.errors, chosen[None], 0)[0]

    def _error(self, by_layer: Array, alone: float) -> float:
        shrinkage = self.shrinkage
        together = np.square(by_layer.sum(axis=0)).sum()
        return float(
            shrinkage.together * together + shrinkage.by_layer * np.square(by_layer).sum() + shrinkage.alone * alone
        )

    def allocate(self, labels: Labels) -> Labels | None:
        """The groups' assignments, [groups, layers]: rule 4."""
        items = _items(self.contributions, self.errors, self.bits, labels, self.active)
        chosen = self.allowance.allocate(items, self.shrinkage)
        firsts = np.unique(labels, return_index=True)[1]
        return None if chosen is None else spread(chosen, self.active[firsts])


def _items(contributions: Array, errors: Array, bits: Array, labels: Labels, active: Active) -> Knapsack:
    """An item for each (group, layer) that runs, in that order; groups are numbered from 0 without gaps."""
    groups = int(labels.max()) + 1
    member = np.eye(groups)[labels]
    summed = np.einsum("tg,ftlr->fglr", member, contributions)
    own = active[np.unique(labels, return_index=True)[1]]  # the steps of a group are of one expert
    return Knapsack(
        cells_of(summed, own, axis=1),
        cells_of(np.einsum("tg,ftl->fgl", member, errors), own, axis=1),
        np.flatnonzero(own) % own.shape[1],
        bits,
        cells_of(np.repeat(member.sum(axis=0)[:, None], own.shape[1], axis=1), own),
    )


def merge(model: ErrorModel, rows: Rows, limit: int, known: dict[bytes, Labels | None] | None = None) -> Rows | None:
    """The policy with at most so many distinct assignments that the model finds when it starts from another policy.

    Args:
        model: of the error; says what may be spent.
        rows: any policy; one that keeps the limit and the budgets is itself a candidate.
        limit: most distinct assignments, at least 1.
        known: allocations of earlier calls with this model, by their groups; receives those of this call.

    Returns:
        None where no policy was found that keeps the budgets.
    """
    known = {} if known is None else known
    chosen = np.asarray(rows, dtype=np.int64)
    labels = _join(model, chosen, limit)
    best, least = None, np.inf
    if len(_distinct(model, chosen)) <= limit and model.allowance.holds(rows):
        best, least = chosen, model.error(chosen)
    for _ in range(_ROUNDS):
        labels = _in_order_of_steps(labels)
        if labels.tobytes() not in known:
            known[labels.tobytes()] = model.allocate(labels)
        table = known[labels.tobytes()]
        if table is None or (error := model.error(table[labels])) >= least:
            break
        best, least = table[labels], error
        labels = _move(model, table, labels)
    return None if best is None else tuple(tuple(int(i) for i in row) for row in best)


def merged_policies(
    sensitivity: Sensitivity,
    bits: Array,
    allowance: Allowance,
    starts: Sequence[Rows],
    limit: int,
    shrinkages: Sequence[Shrinkage] = SHRINKAGES,
) -> list[Rows]:
    """Distinct policies with at most so many assignments: one of every start, the first's with each shrinkage.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        allowance: budgets of the policies.
        starts: policies without a limit, the plan first.
        limit: most distinct assignments.
        shrinkages: the first is that of the starts.
    """
    models = [ErrorModel.of(sensitivity, bits, allowance, shrinkage) for shrinkage in shrinkages]
    known: dict[bytes, dict[bytes, Labels | None]] = {}

    def merged(model: ErrorModel, rows: Rows) -> Rows | None:
        own = model.for_start(rows)
        key = repr(own.shrinkage).encode() + own.prices.tobytes()
        return merge(own, rows, limit, known.setdefault(key, {}))

    found = [merged(models[0], rows) for rows in starts] + [merged(model, starts[0]) for model in models[1:]]
    return list(dict.fromkeys(rows for rows in found if rows is not None))


@dataclass(frozen=True)
class _Group:
    """Steps of one assignment.

    Attributes:
        steps: their indices.
        row: [layers]: its formats.
        contributions: [formats, layers, rows]: of all steps together, in every format.
        errors: [formats, layers]: likewise.
    """

    steps: tuple[int, ...]
    row: Labels
    contributions: Array
    errors: Array

    @property
    def chosen(self) -> Array:
        """[layers, rows]: what its formats contribute."""
        picked: Array = self.contributions[self.row, np.arange(len(self.row))]
        return picked

    def joined(self, other: _Group, row: Labels) -> _Group:
        """Both with one assignment."""
        steps = (*self.steps, *other.steps)
        return _Group(steps, row, self.contributions + other.contributions, self.errors + other.errors)


def _join(model: ErrorModel, chosen: Labels, limit: int) -> Labels:
    """Group the steps: rules 1 and 2, on a sketch of the rows."""
    groups, sketch = [], model.sketch
    for steps in _distinct(model, chosen):
        sums = sketch[:, steps].sum(axis=1), model.errors[:, steps].sum(axis=1)
        groups.append(_Group(tuple(steps.tolist()), chosen[steps[0]], *sums))
    unions: list[tuple[float, Labels, tuple[_Group, _Group]]] = []
    fresh = [pair for pair in combinations(groups, 2) if _share(model, pair)]
    while len(groups) > limit:
        # What a union costs changes little when two other groups are joined, so it is computed once.
        by_layer = np.sum([group.chosen for group in groups], axis=0)
        unions += [(*_union(model, by_layer, pair), pair) for pair in fresh]
        _, shared, (one, other) = min(unions, key=lambda union: union[0])
        joined = one.joined(other, shared)
        groups = [group for group in groups if group is not one and group is not other]
        unions = [u for u in unions if not any(group is one or group is other for group in u[2])]
        fresh = [pair for group in groups if _share(model, pair := (group, joined))]
        groups.append(joined)
    result = np.empty(len(chosen), dtype=np.int64)
    for label, group in enumerate(groups):
        result[list(group.steps)] = label
    return result


def _distinct(model: ErrorModel, chosen: Labels) -> list[Labels]:
    """The steps of each distinct assignment; steps of two experts never have one."""
    keys = np.where(model.active, chosen, -1)
    return [np.flatnonzero((keys == row).all(axis=1)) for row in dict.fromkeys(map(tuple, keys.tolist()))]


def _share(model: ErrorModel, pair: tuple[_Group, _Group]) -> bool:
    """Whether two groups may have one assignment: their steps are of one expert."""
    one, other = (model.active[group.steps[0]] for group in pair)
    return bool((one == other).all())


def _union(model: ErrorModel, by_layer: Array, pair: tuple[_Group, _Group]) -> tuple[float, Labels]:
    """Compute the cost of giving two groups one assignment, and that assignment; layers are looked at one by one.

    Args:
        model: of the error.
        by_layer: [layers, rows]: contributions of all groups as they are.
        pair: the two groups.
    """
    one, other = pair
    shrinkage, rest = model.shrinkage, by_layer - one.chosen - other.chosen
    total, added = by_layer.sum(axis=0), one.contributions + other.contributions
    outside = total - one.chosen - other.chosen
    cost = shrinkage.together * np.square(outside + added).sum(axis=-1)
    cost += shrinkage.by_layer * np.square(rest + added).sum(axis=-1) + shrinkage.alone * (one.errors + other.errors)
    runs = model.active[one.steps[0]]
    prices = np.where(runs, model.prices, 0.0)
    cost += prices * (len(one.steps) + len(other.steps))
    row: Labels = cost.argmin(axis=0)
    before = shrinkage.together * np.square(total).sum() + shrinkage.by_layer * np.square(by_layer).sum(axis=-1)
    for group in pair:
        layers = np.arange(len(group.row))
        price = prices[group.row, layers] * len(group.steps)
        before = before + shrinkage.alone * group.errors[group.row, layers] + price
    return float((cost.min(axis=0) - before).sum()), row


def _in_order_of_steps(labels: Labels) -> Labels:
    """The same groups, numbered in the order in which steps come to them."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([numbers[label] for label in labels.tolist()], dtype=np.int64)


def _move(model: ErrorModel, table: Labels, labels: Labels) -> Labels:
    """Give each step the assignment that suits it best, one step after another; a group may be left empty."""
    labels, layers = labels.copy(), np.arange(table.shape[1])
    options = model.contributions[table[:, None], np.arange(len(labels))[:, None], layers]
    alone = model.errors[table[:, None], np.arange(len(labels))[:, None], layers].sum(axis=-1)
    runs = model.active[np.unique(labels, return_index=True)[1]]
    prices = np.where(runs, model.prices[table, np.arange(table.shape[1])], 0.0).sum(axis=1)
    shrinkage = model.shrinkage
    by_layer = options[labels, np.arange(len(labels))].sum(axis=0)
    for step in range(len(labels)):
        rest = by_layer - options[labels[step], step]
        tried = rest + options[:, step]
        cost = shrinkage.together * np.square(tried.sum(axis=1)).sum(axis=-1)
        cost += shrinkage.by_layer * np.square(tried).sum(axis=(1, 2)) + shrinkage.alone * alone[:, step] + prices
        cost[(runs != model.active[step]).any(axis=1)] = np.inf
        labels[step] = int(cost.argmin())
        by_layer = tried[labels[step]]
    return labels

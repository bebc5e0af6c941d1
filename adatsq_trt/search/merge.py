"""Few assignments: steps share them, since each distinct one is an engine in most layouts.

A policy of the search changes its assignment at nearly every step, because that is free for the error. Here the steps
of a policy are put into at most so many groups, with the error model that the plan is made with (see `joint`):

1. Steps with equal rows are a group.
2. While there are too many, the two groups are joined whose union costs least, when every layer takes the format with
   the least error + price · bits and everything else stays as it is.
3. Each step moves to the group whose assignment suits it best (k-means, with the model's error as the distance).
4. The groups' assignments are allocated anew within the budget: an item for each (group, layer). With weights once
   every layer keeps the weight grid that it has in the policy.

3 and 4 are repeated. What the model proposes is measured on whole samples afterwards, as every other policy is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.candidates import Array
from adatsq_trt.search.joint import Knapsack, Shrinkage, allocate_jointly
from adatsq_trt.search.plan import SHRINKAGES, Rows
from adatsq_trt.search.sensitivity import Sensitivity

_ROUNDS = 4
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ErrorModel:
    """The predicted error of a whole policy (see `joint`), and what it may spend.

    Attributes:
        contributions: [formats, steps, layers, rows].
        errors: [formats, steps, layers]: single errors.
        bits: [formats], ascending.
        budget: largest mean of bits over (step, layer).
        shrinkage: in covariances.
        allowed: [formats, layers]: what a layer may be given; None for everything.
    """

    contributions: Array
    errors: Array
    bits: Array
    budget: float
    shrinkage: Shrinkage
    allowed: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        sensitivity: Sensitivity,
        bits: Array,
        budget: float,
        shrinkage: Shrinkage,
        allowed: NDArray[np.bool_] | None = None,
    ) -> ErrorModel:
        """The model that the plan uses."""
        saturated = sensitivity.saturated()
        contributions, errors = saturated.contributions.double().numpy(), saturated.smoothed_errors().numpy()
        return cls(contributions, errors, bits, budget, shrinkage, allowed)

    def with_weights_of(self, rows: Rows, grids: NDArray[np.int64]) -> ErrorModel:
        """The same where every layer keeps the weight grid that it has in a policy.

        Args:
            rows: a policy with one grid for each layer.
            grids: [formats]: which formats share a grid.
        """
        own = grids[:, None] == grids[list(rows[0])]
        return replace(self, allowed=own if self.allowed is None else own & self.allowed)

    @property
    def step_cost(self) -> Array:
        """[formats, layers]: bits of one step, infinite where a layer may not be given a format."""
        bits = np.repeat(self.bits[:, None], self.errors.shape[2], axis=1)
        return bits if self.allowed is None else np.where(self.allowed, bits, np.inf)

    @property
    def total_bits(self) -> float:
        """The budget as a sum over (step, layer)."""
        _, steps, layers = self.errors.shape
        return float(self.budget * steps * layers)

    def error(self, chosen: Labels) -> float:
        """Predicted latent MSE of a policy, [steps, layers] format indices."""
        picked, alone = self.picked(chosen)
        return self._error(picked.sum(axis=0), alone.sum())

    def picked(self, chosen: Labels) -> tuple[Array, Array]:
        """What the chosen formats contribute: [steps, layers, rows], and their single errors: [steps, layers]."""
        contributions = np.take_along_axis(self.contributions, chosen[None, :, :, None], 0)[0]
        return contributions, np.take_along_axis(self.errors, chosen[None], 0)[0]

    def _error(self, by_layer: Array, alone: float) -> float:
        shrinkage = self.shrinkage
        together = np.square(by_layer.sum(axis=0)).sum()
        return float(
            shrinkage.together * together + shrinkage.by_layer * np.square(by_layer).sum() + shrinkage.alone * alone
        )

    def items(self, labels: Labels) -> Knapsack:
        """An item for each (group, layer), in that order; groups are numbered from 0 without gaps."""
        groups = int(labels.max()) + 1
        member = np.eye(groups)[labels]
        contributions = np.einsum("tg,ftlr->fglr", member, self.contributions)
        formats, _, layers, rows = contributions.shape
        weight = np.repeat(member.sum(axis=0), layers)
        return Knapsack(
            contributions.reshape(formats, groups * layers, rows),
            np.einsum("tg,ftl->fgl", member, self.errors).reshape(formats, groups * layers),
            np.tile(np.arange(layers), groups),
            self.bits,
            weight,
            np.tile(self.step_cost, groups) * weight,
        )

    @cached_property
    def multiplier(self) -> float:
        """Error per bit at which a policy without a limit just meets the budget."""
        return allocate_jointly(self.items(np.arange(self.errors.shape[1])), self.total_bits, self.shrinkage)[1]


def merge(model: ErrorModel, rows: Rows, limit: int, known: dict[bytes, Labels] | None = None) -> Rows:
    """The policy with at most so many distinct assignments that the model finds when it starts from another policy.

    Args:
        model: of the error; says the budget.
        rows: any policy; one that keeps the limit and the budget is itself a candidate.
        limit: most distinct assignments, at least 1.
        known: allocations of earlier calls with this model, by their groups; receives those of this call.
    """
    known = {} if known is None else known
    chosen = np.asarray(rows, dtype=np.int64)
    labels = _join(model, chosen, limit)
    best, least = None, np.inf
    if len(set(rows)) <= limit and model.bits[chosen].sum() <= model.total_bits + 1e-9:
        best, least = chosen, model.error(chosen)
    for _ in range(_ROUNDS):
        groups = _in_order_of_steps(labels)
        if groups.tobytes() not in known:
            known[groups.tobytes()] = _allocate(model, groups)
        labels, table = groups, known[groups.tobytes()]
        error = model.error(table[labels])
        if error >= least:
            break
        best, least = table[labels], error
        labels = _move(model, table, labels)
    assert best is not None, "an allocation has a finite error"
    return tuple(tuple(int(i) for i in row) for row in best)


def merged_policies(
    sensitivity: Sensitivity,
    bits: Array,
    budget: float,
    starts: Sequence[Rows],
    limit: int,
    grids: NDArray[np.int64] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> list[Rows]:
    """Distinct policies with at most so many assignments: one of every start, the first's with each shrinkage.

    Args:
        sensitivity: measured contributions.
        bits: [formats], ascending.
        budget: mean bits per (step, layer).
        starts: policies without a limit, the plan first.
        limit: most distinct assignments.
        grids: [formats]: which formats share a weight grid, of which a layer keeps the one that it has at the start;
            None where its weights may change.
        allowed: [formats, layers]: what a layer may be given, as in every start; None for everything.
    """
    models = [ErrorModel.of(sensitivity, bits, budget, shrinkage, allowed) for shrinkage in SHRINKAGES]
    restricted: dict[bytes, tuple[ErrorModel, dict[bytes, Labels]]] = {}

    def merged(model: ErrorModel, rows: Rows) -> Rows:
        own = model if grids is None else model.with_weights_of(rows, grids)
        key = repr(model.shrinkage).encode() + (b"" if own.allowed is None else own.allowed.tobytes())
        own, known = restricted.setdefault(key, (own, {}))
        return merge(own, rows, limit, known)

    found = [merged(models[0], rows) for rows in starts] + [merged(model, starts[0]) for model in models[1:]]
    return list(dict.fromkeys(found))


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
    """Group the steps: rules 1 and 2."""
    groups = []
    for row in dict.fromkeys(map(tuple, chosen.tolist())):
        steps = np.flatnonzero((chosen == row).all(axis=1))
        sums = model.contributions[:, steps].sum(axis=1), model.errors[:, steps].sum(axis=1)
        groups.append(_Group(tuple(steps.tolist()), np.asarray(row), *sums))
    while len(groups) > limit:
        by_layer = np.sum([group.chosen for group in groups], axis=0)
        unions = [(*_union(model, by_layer, pair), pair) for pair in combinations(groups, 2)]
        _, shared, (one, other) = min(unions, key=lambda union: union[0])
        groups = [g for g in groups if g is not one and g is not other] + [one.joined(other, shared)]
    result = np.empty(len(chosen), dtype=np.int64)
    for label, group in enumerate(groups):
        result[list(group.steps)] = label
    return result


def _union(model: ErrorModel, by_layer: Array, pair: tuple[_Group, _Group]) -> tuple[float, Labels]:
    """What it costs to give two groups one assignment, and that assignment; layers are looked at one by one.

    Args:
        model: of the error.
        by_layer: [layers, rows]: what all groups contribute as they are.
        pair: the two groups.
    """
    one, other = pair
    shrinkage, rest = model.shrinkage, by_layer - one.chosen - other.chosen
    total, added = by_layer.sum(axis=0), one.contributions + other.contributions
    outside = total - one.chosen - other.chosen
    bits, paid = model.multiplier * model.bits, model.multiplier * model.step_cost
    cost = shrinkage.together * np.square(outside + added).sum(axis=-1)
    cost += shrinkage.by_layer * np.square(rest + added).sum(axis=-1) + shrinkage.alone * (one.errors + other.errors)
    cost += paid * (len(one.steps) + len(other.steps))
    row: Labels = cost.argmin(axis=0)
    before = shrinkage.together * np.square(total).sum() + shrinkage.by_layer * np.square(by_layer).sum(axis=-1)
    for group in pair:
        layers = np.arange(len(group.row))
        before = before + shrinkage.alone * group.errors[group.row, layers] + bits[group.row] * len(group.steps)
    return float((cost.min(axis=0) - before).sum()), row


def _in_order_of_steps(labels: Labels) -> Labels:
    """The same groups, numbered in the order in which steps come to them."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([numbers[label] for label in labels.tolist()], dtype=np.int64)


def _allocate(model: ErrorModel, labels: Labels) -> Labels:
    """The groups' assignments, [groups, layers]: rule 4."""
    chosen, _ = allocate_jointly(model.items(labels), model.total_bits, model.shrinkage)
    return chosen.reshape(labels.max() + 1, -1)


def _move(model: ErrorModel, table: Labels, labels: Labels) -> Labels:
    """Give each step the assignment that suits it best, one step after another; a group may be left empty."""
    labels, layers = labels.copy(), np.arange(table.shape[1])
    options = model.contributions[table[:, None], np.arange(len(labels))[:, None], layers]
    alone = model.errors[table[:, None], np.arange(len(labels))[:, None], layers].sum(axis=-1)
    multiplier, shrinkage = model.multiplier * model.bits[table].sum(axis=1), model.shrinkage
    by_layer = options[labels, np.arange(len(labels))].sum(axis=0)
    for step in range(len(labels)):
        rest = by_layer - options[labels[step], step]
        tried = rest + options[:, step]
        cost = shrinkage.together * np.square(tried.sum(axis=1)).sum(axis=-1)
        cost += shrinkage.by_layer * np.square(tried).sum(axis=(1, 2)) + shrinkage.alone * alone[:, step] + multiplier
        labels[step] = int(cost.argmin())
        by_layer = tried[labels[step]]
    return labels

"""Allocation under the accumulated error: coordinate descent on a second-order model of the final picture.

Single errors do not simply add: the same rounded weight errs the same way at every step. With the signed contributions
c of `sensitivity`, a choice of formats has the predicted error Σ_r (Σ_i c[f_i, i, r])². A few hundred rows cannot
tell real cancellation from luck among a thousand choices, so that sum is shrunk in two stages, towards the sum over
layers of each layer's own accumulated error, which is what a rounded weight does, and towards its diagonal:

    together Σ_r (Σ_i c_i)² + by_layer Σ_l Σ_r (Σ_{i in l} c_i)² + alone Σ_i Σ_r c_i² + multiplier Σ_i bits_i,

where together + by_layer + alone = 1. The figures are in docs/decisions/0012.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.candidates import Array, spend_the_rest, steepest_multiplier
from adatsq_trt.search.descent import descend_layer, descent_pass

SWEEPS = 6
Selection = NDArray[np.int64]


@dataclass(frozen=True)
class Shrinkage:
    """How far the measured covariances of errors are believed; what is left of 1 goes to single errors.

    Attributes:
        together: between all items.
        by_layer: between the items of one layer.
    """

    together: float
    by_layer: float

    @property
    def alone(self) -> float:
        """The diagonal's share."""
        return 1 - self.together - self.by_layer

    @property
    def layered(self) -> float:
        """Share of `by_layer` in everything but `together`."""
        return self.by_layer / (1 - self.together) if self.together < 1 else 0.0


@dataclass(frozen=True)
class Knapsack:
    """Knapsack problem: errors and costs of every format of every item.

    Attributes:
        contributions: [formats, items, rows].
        errors: [formats, items]: the diagonal, possibly a better estimate than the rows give.
        layers: [items]: the layer of each, from 0.
        bits: [formats], ascending.
        weight: [items]: how many (step, layer) an item stands for.
        cost: [formats, items]: used instead of weight * bits, infinite where a format may not be taken.
    """

    contributions: Array
    errors: Array
    layers: NDArray[np.int64]
    bits: Array
    weight: Array
    cost: Array | None = None

    @property
    def costs(self) -> Array:
        """[formats, items]: what is paid."""
        return self.bits[:, None] * self.weight if self.cost is None else self.cost

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """[items]: in which items are looked at."""
        return np.random.default_rng(0).permutation(len(self.layers))

    @cached_property
    def products(self) -> list[tuple[NDArray[np.int64], Array]]:
        """For each layer its items, in order, and Σ_r c_r c'_r of their contributions: [items, formats] squared."""
        found = []
        for layer in np.unique(self.layers):
            own = self.order[self.layers[self.order] == layer]
            rows = np.ascontiguousarray(self.contributions[:, own].swapaxes(0, 1))
            flat = rows.reshape(-1, rows.shape[-1])
            found.append((own, (flat @ flat.T).reshape(rows.shape[:2] * 2)))
        return found


def coordinate_descent(items: Knapsack, multiplier: float, shrinkage: Shrinkage) -> Selection:
    """Find formats that no single change improves (or the best after a few passes).

    Args:
        items: the knapsack problem.
        multiplier: error per bit, or per unit of the items' own cost.
        shrinkage: see the module.

    Returns:
        [items] format indices.
    """
    contributions, places = items.contributions, np.arange(len(items.layers))
    paid = multiplier * items.costs
    chosen: Selection = np.argmin(items.errors + paid, axis=0)
    fixed = np.ascontiguousarray((shrinkage.alone * items.errors + paid).T)
    if shrinkage.together == 0:  # layers do not depend on each other, and products say all
        for own, products in items.products:
            chosen[own] = descend_layer(products, fixed[own], shrinkage.by_layer, chosen[own], SWEEPS)
        return chosen
    total = contributions[chosen, places].sum(axis=0)
    layers = np.zeros((items.layers.max(initial=0) + 1, contributions.shape[2]))
    np.add.at(layers, items.layers, contributions[chosen, places])
    by_item = np.ascontiguousarray(contributions.swapaxes(0, 1))
    for _ in range(SWEEPS):
        if not descent_pass(
            by_item, fixed, items.layers, items.order, shrinkage.together, shrinkage.by_layer, chosen, total, layers
        ):
            break
    return chosen


def predicted_error(items: Knapsack, chosen: Selection, shrinkage: Shrinkage) -> float:
    """The error of a selection [items] of formats, without its cost."""
    places = np.arange(len(chosen))
    picked = items.contributions[chosen, places]
    layers = np.zeros((items.layers.max(initial=0) + 1, picked.shape[1]))
    np.add.at(layers, items.layers, picked)
    together, by_layer = np.square(layers.sum(axis=0)).sum(), np.square(layers).sum()
    alone = items.errors[chosen, places].sum()
    return float(shrinkage.together * together + shrinkage.by_layer * by_layer + shrinkage.alone * alone)


def allocate_jointly(items: Knapsack, budget: float, shrinkage: Shrinkage) -> tuple[Selection, float]:
    """Choose formats within a budget, and return them with their multiplier.

    Args:
        items: the knapsack problem.
        budget: largest sum of costs; at least that of the cheapest format everywhere.
        shrinkage: see the module.
    """
    errors, costs, places = items.errors, items.costs, np.arange(len(items.layers))
    # Accumulated errors save more per bit than single ones.
    high = 8 * steepest_multiplier(errors, items.bits, items.weight)
    low, chosen, multiplier = high * 1e-9, np.argmin(costs, axis=0), high
    for _ in range(18):
        middle = float(np.sqrt(low * high))
        trial = coordinate_descent(items, middle, shrinkage)
        if costs[trial, places].sum() <= budget + 1e-9:
            chosen, multiplier, high = trial, middle, middle
        else:
            low = middle
    return spend_the_rest(errors, costs, budget, chosen), multiplier

"""The compiled loop beside the loop that it stands for, number by number."""

import numpy as np
import pytest

from adatsq_trt.search.joint import SWEEPS, Knapsack, Selection, Shrinkage, coordinate_descent


def plain_descend(items: Knapsack, multiplier: float, shrinkage: Shrinkage) -> Selection:
    """`coordinate_descent` in NumPy's operations."""
    contributions, places = items.contributions, np.arange(len(items.layers))
    fixed = shrinkage.alone * items.errors + multiplier * items.costs
    chosen: Selection = np.argmin(items.errors + multiplier * items.costs, axis=0)
    total = contributions[chosen, places].sum(axis=0)
    layers = np.zeros((items.layers.max() + 1, contributions.shape[2]))
    np.add.at(layers, items.layers, contributions[chosen, places])
    for _ in range(SWEEPS):
        before = chosen.copy()
        for item in np.random.default_rng(0).permutation(places):
            own, layer = contributions[:, item], items.layers[item]
            others, within = total - own[chosen[item]], layers[layer] - own[chosen[item]]
            cost = shrinkage.together * np.square(others + own).sum(axis=1) + fixed[:, item]
            cost += shrinkage.by_layer * np.square(within + own).sum(axis=1)
            chosen[item] = cost.argmin()
            if chosen[item] != before[item]:
                total, layers[layer] = others + own[chosen[item]], within + own[chosen[item]]
        if np.array_equal(chosen, before):
            break
    return chosen


# Below, at and beyond the lengths at which NumPy sums in another order.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100, 128, 129, 136, 512, 1000])
@pytest.mark.parametrize("shrinkage", [Shrinkage(0.2, 0.5), Shrinkage(0.5, 0.0), Shrinkage(0.0, 0.5)])
def test_the_same_choice_to_the_last_digit(rows: int, shrinkage: Shrinkage) -> None:
    steps, layers, rng = 5, 6, np.random.default_rng(rows)
    size = np.array([0.5, 0.2, 0.1, 0.0])[:, None, None] / np.sqrt(rows)
    contributions = size * (rng.normal(size=(4, steps * layers, rows)) + rng.normal(size=(4, 1, rows)))
    for cost in (None, np.where(rng.random((4, steps * layers)) < 0.1, np.inf, rng.random((4, steps * layers)))):
        items = Knapsack(
            contributions,
            np.square(contributions).sum(axis=-1),
            np.tile(np.arange(layers), steps),
            np.array([3.0, 4.0, 6.0, 8.0]),
            np.ones(steps * layers),
            cost,
        )
        for multiplier in np.geomspace(1e-4, 1, 6):
            assert np.array_equal(
                coordinate_descent(items, multiplier, shrinkage), plain_descend(items, multiplier, shrinkage)
            )

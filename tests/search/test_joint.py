"""Coordinate descent on the accumulated error."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.search.candidates import Array, allocate, tiers
from adatsq_trt.search.joint import Knapsack, Selection, Shrinkage, allocate_jointly, coordinate_descent

BITS = np.array([3.0, 4.0, 8.0])


def random_contributions(seed: int, items: int = 6, rows: int = 20) -> Array:
    """Items err partly in the same direction, as one weight does at all steps."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(3, 1, rows)), rng.normal(size=(3, items, rows))
    return (common + own) * np.exp2(-BITS)[:, None, None] * np.exp(rng.normal(0, 0.7, (1, items, 1)))


def make_items(contributions: Array, weight: Array | None = None) -> Knapsack:
    """Two items to a layer."""
    count = contributions.shape[1]
    errors = np.square(contributions).sum(axis=-1)
    return Knapsack(contributions, errors, np.arange(count) // 2, BITS, np.ones(count) if weight is None else weight)


def objective(items: Knapsack, chosen: Selection, multiplier: float, shrinkage: Shrinkage) -> float:
    places = np.arange(len(chosen))
    picked = items.contributions[chosen, places]
    layers = [picked[items.layers == layer].sum(axis=0) for layer in set(items.layers.tolist())]
    error = shrinkage.together * np.square(picked.sum(axis=0)).sum() + shrinkage.by_layer * np.square(layers).sum()
    return float(error + shrinkage.alone * items.errors[chosen, places].sum() + multiplier * BITS[chosen].sum())


TRUSTED, ALONE = Shrinkage(1.0, 0.0), Shrinkage(0.0, 0.0)
seeds, multipliers = st.integers(0, 1000), st.floats(-6, -1)
trusts = st.sampled_from([TRUSTED, Shrinkage(0.2, 0.5), Shrinkage(0.5, 0.0), Shrinkage(0.0, 0.9), ALONE])


@given(seeds, trusts, multipliers)
def test_no_single_change_improves_the_result(seed: int, shrinkage: Shrinkage, exponent: float) -> None:
    items, multiplier = make_items(random_contributions(seed)), 10.0**exponent
    chosen = coordinate_descent(items, multiplier, shrinkage)
    reached = objective(items, chosen, multiplier, shrinkage)
    for item, fmt in itertools.product(range(6), range(3)):
        other = chosen.copy()
        other[item] = fmt
        assert objective(items, other, multiplier, shrinkage) >= reached * (1 - 1e-9)
    start = tiers(items.errors, BITS, np.ones(6), multiplier)
    assert reached <= objective(items, start, multiplier, shrinkage) * (1 + 1e-9)


@given(seeds, multipliers)
def test_without_trust_it_is_tiers(seed: int, exponent: float) -> None:
    items = make_items(random_contributions(seed))
    expected = tiers(items.errors, BITS, np.ones(6), 10.0**exponent)
    assert np.array_equal(coordinate_descent(items, 10.0**exponent, ALONE), expected)


@given(seeds, trusts, st.floats(3, 9), st.integers(1, 12))
def test_the_budget_holds(seed: int, shrinkage: Shrinkage, mean: float, count: int) -> None:
    weight = np.random.default_rng(seed).integers(1, 3, count).astype(float)
    chosen, multiplier = allocate_jointly(
        make_items(random_contributions(seed, count), weight), mean * weight.sum(), shrinkage
    )
    assert (BITS[chosen] * weight).sum() <= mean * weight.sum() + 1e-6
    assert multiplier > 0


def test_joint_allocation_beats_single_errors_where_errors_accumulate() -> None:
    gains = []
    for seed in range(30):
        items = make_items(random_contributions(seed, items=12))
        alone = allocate(items.errors, BITS, np.ones(12), 4.0 * 12)
        jointly, _ = allocate_jointly(items, 4.0 * 12, TRUSTED)
        gains.append(objective(items, jointly, 0, TRUSTED) / objective(items, alone, 0, TRUSTED))
    assert np.mean(gains) < 0.95


# The second item errs least in format 2, but in format 0 it undoes what the first one does, and is cheaper.
CANCELLING = np.array([[[1.0], [-0.35]], [[0.5], [0.3]], [[0.3], [0.25]]])


def test_errors_that_cancel_are_found() -> None:
    assert coordinate_descent(make_items(CANCELLING), 1e-6, TRUSTED).tolist() == [2, 0]
    assert coordinate_descent(make_items(CANCELLING), 1e-6, ALONE).tolist() == [2, 2]


def test_only_items_of_one_layer_cancel_by_layer() -> None:
    items = make_items(CANCELLING)
    assert coordinate_descent(items, 1e-6, Shrinkage(0.0, 1.0)).tolist() == [2, 0]
    assert coordinate_descent(replace(items, layers=np.array([0, 1])), 1e-6, Shrinkage(0.0, 1.0)).tolist() == [2, 2]

"""Coordinate descent on the accumulated error."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.search.candidates import Array, allocate, tiers
from adatsq_trt.search.joint import Choice, allocate_jointly, descend

BITS = np.array([3.0, 4.0, 8.0])


def random_contributions(seed: int, items: int = 6, rows: int = 20) -> Array:
    """Items err partly in the same direction, as one weight does at all steps."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(3, 1, rows)), rng.normal(size=(3, items, rows))
    return (common + own) * np.exp2(-BITS)[:, None, None] * np.exp(rng.normal(0, 0.7, (1, items, 1)))


def objective(contributions: Array, errors: Array, chosen: Choice, price: float, shrink: float) -> float:
    items = np.arange(len(chosen))
    together = np.square(contributions[chosen, items].sum(axis=0)).sum()
    return float((1 - shrink) * together + shrink * errors[chosen, items].sum() + price * BITS[chosen].sum())


seeds, shrinks, prices = st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 0.85, 1.0]), st.floats(-6, -1)


@given(seeds, shrinks, prices)
def test_no_single_change_improves_the_result(seed: int, shrink: float, exponent: float) -> None:
    contributions, price = random_contributions(seed), 10.0**exponent
    errors = np.square(contributions).sum(axis=-1)
    chosen = descend(contributions, errors, BITS, np.ones(6), price, shrink)
    reached = objective(contributions, errors, chosen, price, shrink)
    for item, fmt in itertools.product(range(6), range(3)):
        other = chosen.copy()
        other[item] = fmt
        assert objective(contributions, errors, other, price, shrink) >= reached * (1 - 1e-9)
    start = tiers(errors, BITS, np.ones(6), price)
    assert reached <= objective(contributions, errors, start, price, shrink) * (1 + 1e-9)


@given(seeds, prices)
def test_full_shrinking_is_tiers(seed: int, exponent: float) -> None:
    contributions, ones = random_contributions(seed), np.ones(6)
    errors = np.square(contributions).sum(axis=-1)
    got = descend(contributions, errors, BITS, ones, 10.0**exponent, 1.0)
    assert np.array_equal(got, tiers(errors, BITS, ones, 10.0**exponent))


@given(seeds, shrinks, st.floats(3, 9), st.integers(1, 12))
def test_the_budget_holds(seed: int, shrink: float, mean: float, items: int) -> None:
    contributions = random_contributions(seed, items)
    weight = np.random.default_rng(seed).integers(1, 3, items).astype(float)
    errors, budget = np.square(contributions).sum(axis=-1), mean * weight.sum()
    chosen, price = allocate_jointly(contributions, errors, BITS, weight, budget, shrink)
    assert (BITS[chosen] * weight).sum() <= budget + 1e-6
    assert price > 0


def test_joint_allocation_beats_single_errors_where_errors_accumulate() -> None:
    gains = []
    for seed in range(30):
        contributions = random_contributions(seed, items=12)
        errors = np.square(contributions).sum(axis=-1)
        arguments = (BITS, np.ones(12), 4.0 * 12)
        alone = allocate(errors, *arguments)
        jointly, _ = allocate_jointly(contributions, errors, *arguments, 0.0)
        gains.append(objective(contributions, errors, jointly, 0, 0) / objective(contributions, errors, alone, 0, 0))
    assert np.mean(gains) < 0.95


def test_errors_that_cancel_are_found() -> None:
    # The second item errs least in format 2, but in format 0 it undoes what the first one does, and is cheaper.
    contributions = np.array([[[1.0], [-0.35]], [[0.5], [0.3]], [[0.3], [0.25]]])
    errors = np.square(contributions).sum(axis=-1)
    assert descend(contributions, errors, BITS, np.ones(2), 1e-6, 0.0).tolist() == [2, 0]
    assert descend(contributions, errors, BITS, np.ones(2), 1e-6, 1.0).tolist() == [2, 2]

"""Tiers and allocation against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from adatsq_trt.search.candidates import allocate, spend_the_rest, steepest_multiplier, tiers

BITS = (np.array([3.0, 4.0, 8.0]), np.array([4.0, 8.0, 8.0, 32.0]), np.array([4.0, 4.0]), np.array([8.0]))


@st.composite
def problems(draw: st.DrawFn, most: int = 12):  # type: ignore[no-untyped-def]
    bits = draw(st.sampled_from(BITS))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    items = draw(st.integers(1, most))
    falling = rng.exponential(1.0, (len(bits), items)) * np.exp2(-bits * rng.uniform(0.2, 2))[:, None]
    weight = rng.integers(1, 4, items).astype(float) if draw(st.booleans()) else np.ones(items)
    cheapest, dearest = bits[0] * weight.sum(), bits[-1] * weight.sum()
    budget = cheapest + draw(st.floats(0, 1.1)) * (dearest - cheapest)
    return falling, bits, weight, budget


def cost(chosen: np.ndarray, bits: np.ndarray, weight: np.ndarray) -> float:
    return float((bits[chosen] * weight).sum())


def error(errors: np.ndarray, chosen: np.ndarray) -> float:
    return float(errors[chosen, np.arange(len(chosen))].sum())


@given(problems())
def test_the_budget_holds(problem) -> None:  # type: ignore[no-untyped-def]
    errors, bits, weight, budget = problem
    chosen = allocate(errors, bits, weight, budget)
    assert cost(chosen, bits, weight) <= budget + 1e-6
    assert chosen.shape == weight.shape


@given(problems())
def test_no_upgrade_is_left_that_fits_and_helps(problem) -> None:  # type: ignore[no-untyped-def]
    errors, bits, weight, budget = problem
    chosen = allocate(errors, bits, weight, budget)
    left = budget - cost(chosen, bits, weight)
    for item in range(len(weight)):
        for fmt in range(len(bits)):
            extra = (bits[fmt] - bits[chosen[item]]) * weight[item]
            assert not (0 < extra <= left - 1e-6 and errors[fmt, item] < errors[chosen[item], item])


@given(problems(most=5))
def test_allocation_is_optimal_up_to_one_item(problem) -> None:  # type: ignore[no-untyped-def]
    errors, bits, weight, budget = problem
    chosen = allocate(errors, bits, weight, budget)
    every = [np.array(c) for c in itertools.product(range(len(bits)), repeat=len(weight))]
    best = min(error(errors, c) for c in every if cost(c, bits, weight) <= budget + 1e-9)
    got = error(errors, chosen)
    assert got >= best - 1e-12
    # Convex relaxation: all but one item are chosen as the optimum's price says, so one item's range bounds the gap.
    assert got <= best + float((errors.max(axis=0) - errors.min(axis=0)).max()) + 1e-12


@given(problems(), st.floats(-12, 2))
def test_tiers_minimize_error_plus_price(problem, exponent: float) -> None:  # type: ignore[no-untyped-def]
    errors, bits, weight, _ = problem
    multiplier = 10.0**exponent
    chosen = tiers(errors, bits, weight, multiplier)
    lagrangian = errors + multiplier * bits[:, None] * weight
    assert np.array_equal(lagrangian[chosen, np.arange(len(weight))], lagrangian.min(axis=0))


@given(problems())
def test_the_steepest_price_is_the_cheapest_policys(problem) -> None:  # type: ignore[no-untyped-def]
    errors, bits, weight, _ = problem
    chosen = tiers(errors, bits, weight, steepest_multiplier(errors, bits, weight))
    assert (bits[chosen] == bits[0]).all()


def test_of_two_formats_with_equal_bits_the_better_wins() -> None:
    bits, ones = np.array([4.0, 8.0, 8.0]), np.ones(3)
    errors = np.array([[1.0, 1.0, 1.0], [0.1, 0.3, 0.1], [0.2, 0.1, 0.2]])
    assert allocate(errors, bits, ones, 24.0).tolist() == [1, 2, 1]
    assert allocate(errors, bits, ones, 20.0).tolist() in ([1, 2, 0], [1, 0, 1], [0, 2, 1])


@pytest.mark.parametrize("budget", [8.0, 9.0, 11.9])
def test_upgrades_go_by_error_saved_per_bit(budget: float) -> None:
    errors = np.array([[10.0, 6.0], [5.0, 0.5], [0.0, 0.4]])
    bits, ones, cheapest = np.array([4.0, 5.0, 8.0]), np.ones(2), np.zeros(2, np.int64)
    # 5.5 for one bit, then 5 for one bit, then no more than 3 bits are left.
    expected = {8.0: [0, 0], 9.0: [0, 1], 11.9: [1, 1]}[budget]
    assert spend_the_rest(errors, bits[:, None] * ones, budget, cheapest).tolist() == expected
    assert cheapest.tolist() == [0, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_an_exact_solver_finds_hardly_less(seed: int) -> None:
    """HiGHS, on the size of the smallest model: 20 steps of 44 layers."""
    generator, bits, items = np.random.default_rng(seed), np.array([4.0, 6.0, 8.0, 16.0]), 880
    errors = np.exp(generator.normal(0, 1.5, items)) * 4.0 ** (4 - bits[:, None])
    errors = errors * np.exp(generator.normal(0, 0.3, (4, items)))
    weight = generator.choice([1.0, 2.0, 4.0], items)
    budget = 6.5 * weight.sum()
    one_each = LinearConstraint(kron(eye_array(items), np.ones((1, 4)), format="csr"), 1, 1)
    within = LinearConstraint(csr_array((weight[:, None] * bits).reshape(1, -1)), -np.inf, budget)
    exact = milp(errors.T.ravel(), constraints=[one_each, within], integrality=np.ones(4 * items), bounds=Bounds(0, 1))
    found = error(errors, allocate(errors, bits, weight, budget))
    assert exact.mip_dual_bound * (1 - 1e-9) <= found <= exact.fun * 1.001

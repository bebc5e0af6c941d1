"""Several budgets at once, beside brute force on problems small enough for it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.errors import BudgetError
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape, Policy, resident_weight_bytes
from adatsq_trt.search.budgets import Additive, Budgets, Storage
from adatsq_trt.search.candidates import Array
from adatsq_trt.search.joint import Knapsack, Shrinkage
from adatsq_trt.search.lagrangian import Constraints, allocate_within, choose_stored_sets

FORMAT_NAMES = ("nvfp4", "fp8", "bf16")
SET = tuple(FORMATS[name] for name in FORMAT_NAMES)
BITS = np.array([fmt.bits for fmt in SET])
STEPS, LAYERS = 2, 3
SHAPES = tuple(LayerShape(f"l{i}", 64 * (1 + i), 128, 16) for i in range(LAYERS))
ALONE = Shrinkage(0.0, 0.0)
EVERY_ROW = tuple(itertools.product(range(3), repeat=LAYERS))
EVERY_POLICY = np.array(list(itertools.product(EVERY_ROW, repeat=STEPS)))


def errors_of(seed: int) -> Array:
    """[formats, steps, layers]: more bits err less, by different factors."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 1.5, (1, STEPS, LAYERS)))
    return np.exp2(-BITS)[:, None, None] * scale * np.exp(rng.normal(0, 0.3, (3, STEPS, LAYERS)))


def budgets_of(bits: float | None, share: float | None, ms: float | None = None) -> Budgets:
    """Mean bits; bytes and milliseconds as a place between the least and the most."""
    additive = []
    if bits is not None:
        additive.append(Additive("bits", np.repeat(BITS[:, None], LAYERS, axis=1), bits * STEPS * LAYERS))
    if ms is not None:
        cost = np.array([[3.0, 1.0, 2.0], [2.0, 2.0, 3.0], [4.0, 4.0, 4.0]])  # nvfp4 is not always the fastest
        least, most = STEPS * cost.min(axis=0).sum(), STEPS * cost.max(axis=0).sum()
        additive.append(Additive("ms", cost, least + ms * (most - least)))
    storage = None
    if share is not None:
        storage = Storage.of(SET, SHAPES, 0)
        least, most = storage.bytes.min(axis=0).sum(), storage.bytes.sum()
        storage = Storage(storage.grids, storage.bytes, float(least + share * (most - least)))
    return Budgets(STEPS, tuple(additive), storage)


def solve(errors: Array, budgets: Budgets) -> Array:
    """The policy [steps, layers] for single errors."""
    flat = errors.reshape(3, -1)
    constraints = Constraints.each(budgets, 3, LAYERS)
    items = Knapsack(np.sqrt(flat)[..., None], flat, np.tile(np.arange(LAYERS), STEPS), BITS, np.ones(STEPS * LAYERS))
    chosen, _ = allocate_within(items, constraints, choose_stored_sets(flat, constraints), ALONE)
    return chosen.reshape(STEPS, LAYERS)


def error(errors: Array, rows: Array) -> float:
    steps, layers = np.indices((STEPS, LAYERS))
    return float(errors[rows, steps, layers].sum())


def best_error(errors: Array, budgets: Budgets) -> float:
    """The least error of all policies that keep the budgets."""
    return min(error(errors, rows) for rows in EVERY_POLICY if budgets.holds(rows.tolist()))


CASES = {
    "bits": budgets_of(6.5, None),
    "bytes": budgets_of(None, 0.3),
    "ms": budgets_of(None, None, 0.4),
    "bits and bytes": budgets_of(7.0, 0.5),
    "bytes and ms": budgets_of(None, 0.5, 0.6),
    "all": budgets_of(8.0, 0.6, 0.6),
}


@pytest.mark.parametrize("name", CASES)
def test_budgets_hold_and_little_is_lost_to_brute_force(name: str) -> None:
    budgets, regrets = CASES[name], []
    for seed in range(12):
        errors = errors_of(seed)
        rows = solve(errors, budgets)
        assert budgets.holds(rows.tolist())
        regrets.append(error(errors, rows) / best_error(errors, budgets) - 1)
    assert min(regrets) > -1e-9
    assert np.median(regrets) < 0.15
    assert np.mean(regrets) < 0.5


def test_bytes_alone_store_one_format_of_each_layer() -> None:
    for seed in range(10):
        rows = solve(errors_of(seed), CASES["bytes"])
        assert all(len(set(rows[:, layer])) == 1 for layer in range(LAYERS))


def test_bits_and_bytes_store_several_formats_where_both_leave_room() -> None:
    found = [solve(errors_of(seed), budgets_of(8.0, 0.9)) for seed in range(10)]
    assert any(len(set(rows[:, layer])) > 1 for rows in found for layer in range(LAYERS))


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(4.0, 16.0), st.floats(0.0, 1.0), st.floats(0.05, 1.0))
def test_whatever_comes_out_keeps_every_budget(seed: int, bits: float, share: float, ms: float) -> None:
    budgets = budgets_of(bits, share, ms)
    feasible = any(budgets.holds(rows.tolist()) for rows in EVERY_POLICY[:: STEPS * 7])
    try:
        rows = solve(errors_of(seed), budgets)
    except BudgetError:
        assert not feasible or bits < 6
    else:
        assert budgets.holds(rows.tolist())


def test_a_prefix_fits_while_a_known_rest_does() -> None:
    budgets = budgets_of(6.0, None)
    own, floor = [(1, 0, 0), (0, 1, 1)], [(0, 0, 0)] * 2
    assert budgets.holds(own)
    assert budgets.fits([], [own, floor])
    assert budgets.fits([(1, 1, 1)], [own, floor])  # with the floor
    assert not budgets.fits([(2, 2, 1)], [own, floor])


def test_bytes_are_those_that_a_policy_is_reported_with() -> None:
    storage = Storage.of(SET, SHAPES, 1e9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(0, 3, (5, LAYERS))
        names = [[FORMAT_NAMES[i] for i in row] for row in rows]
        policy = Policy.from_steps("model", "0" * 64, [shape.name for shape in SHAPES], names)
        assert round(storage.used(rows)) == resident_weight_bytes(policy, {shape.name: shape for shape in SHAPES})


def test_formats_with_the_same_weights_are_stored_once() -> None:
    """int8 weights are one copy, whatever the activations are."""
    formats = tuple(FORMATS[name] for name in ("w4a8", "w8a8", "w8a8s"))
    storage = Storage.of(formats, SHAPES, 1e9)
    if formats[1].weight == formats[2].weight:
        assert storage.grids.tolist() == [0, 1, 1]
        assert storage.used(np.array([[1, 1, 1], [2, 2, 2]])) == storage.used(np.array([[1, 1, 1]]))
    assert storage.used(np.array([[0, 0, 0], [1, 1, 1]])) > storage.used(np.array([[1, 1, 1]]))


def test_budgets_that_exclude_each_other_are_refused() -> None:
    tight = budgets_of(4.0, None, 0.0)  # nvfp4 everywhere, and the fastest everywhere, which is not nvfp4
    assert not any(tight.holds(rows.tolist()) for rows in EVERY_POLICY)
    with pytest.raises(BudgetError, match="no policy was found that keeps all budgets at once"):
        solve(errors_of(0), tight)


def test_a_format_that_keeps_all_budgets_everywhere_is_found_where_prices_fail() -> None:
    """The smallest weight is slow, the fastest large: only the format between them keeps both."""
    shapes = (LayerShape("a", 64, 64, 4), LayerShape("b", 64, 64, 4))
    formats = tuple(FORMATS[name] for name in ("w3a3", "w4a4", "w8a8"))
    storage, ms = Storage.of(formats, shapes), np.array([[9.0, 9.0], [2.0, 2.0], [1.0, 1.0]])
    steps, own = 2, float(storage.bytes[1].sum())
    budgets = Budgets(steps, (Additive("ms", ms, 2.0 * 2 * steps),), Storage(storage.grids, storage.bytes, own))
    constraints = Constraints.each(budgets, 3, 2)
    sets = choose_stored_sets(np.array([[3.0] * 4, [2.0] * 4, [1.0] * 4]), constraints)
    assert constraints.holds(sets.chosen)

"""Formats that some layers may not have: no search gives them, whatever the budgets, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.search.lagrangian import Constraints, accumulated_errors, choose_stored_sets
from adatsq_trt.search.merge import Several, merged_policies
from adatsq_trt.search.plan import make_constrained_plan
from adatsq_trt.search.static import constrained_layer_only, constrained_time_only
from tests.search.test_once import (
    BITS,
    EVERY_POLICY,
    GRIDS,
    LAYERS,
    SET,
    SHRINKAGES,
    STEPS,
    budgets_of,
    items_of,
    predicted_error,
    random_sensitivity,
    solve,
)

MASKS = st.lists(
    st.lists(st.booleans(), min_size=len(SET), max_size=len(SET)).filter(any), min_size=LAYERS, max_size=LAYERS
)


def masked(bits: float, allowed: np.ndarray, once: bool, share: float | None = None):
    budgets = replace(budgets_of(bits, share), allowed=allowed)
    assert budgets.storage is not None
    return budgets if once else replace(budgets, storage=replace(budgets.storage, once=False))


def keeps(rows, allowed: np.ndarray) -> bool:
    return bool(allowed[np.array(rows), np.arange(LAYERS)].all())


@settings(max_examples=25, deadline=None)
@given(MASKS, st.booleans(), st.integers(0, 10))
def test_no_policy_has_a_forbidden_format(mask: list[list[bool]], once: bool, seed: int) -> None:
    allowed, sensitivity = np.array(mask).T, random_sensitivity(seed)
    # Enough for the dearest allowed format of every layer.
    budgets = masked(float(np.where(allowed, BITS[:, None], 0).max(axis=0).mean()), allowed, once)
    by_layer = constrained_layer_only(sensitivity, BITS, budgets)
    plan, cost, prices = make_constrained_plan(sensitivity, BITS, budgets, 4, by_layer)
    merged = merged_policies(sensitivity, BITS, Several(budgets, prices), plan.policies, 1)
    policies = [*plan.policies, *plan.hedges, *by_layer, *constrained_time_only(sensitivity, BITS, budgets), *merged]
    assert by_layer
    assert all(keeps(rows, allowed) for rows in policies)
    assert all(keeps(column, allowed) for column in plan.columns)
    assert np.isinf(cost[~allowed]).all()


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("share", [None, 0.6])
def test_a_mask_of_everything_changes_nothing(once: bool, share: float | None) -> None:
    sensitivity, everything = random_sensitivity(3), np.ones((len(SET), LAYERS), dtype=bool)
    given_mask = masked(4.0, everything, once, share)
    plans = [make_constrained_plan(sensitivity, BITS, b, 4)[0] for b in (given_mask, replace(given_mask, allowed=None))]
    assert plans[0].policies == plans[1].policies
    assert plans[0].columns == plans[1].columns
    assert plans[0].hedges == plans[1].hedges


def test_little_is_lost_to_the_best_of_all_allowed_policies() -> None:
    allowed = np.ones((len(SET), LAYERS), dtype=bool)
    allowed[:2, 0] = allowed[3:, 1] = False  # 3-bit weights in the first layer, 5-bit weights in the second
    budgets, regrets = masked(4.0, allowed, once=True), []
    for seed in range(20):
        items = items_of(random_sensitivity(seed))
        kept = [rows.ravel() for rows in EVERY_POLICY if budgets.holds(rows.tolist())]
        best = min(predicted_error(items, rows, SHRINKAGES[0]) for rows in kept)
        chosen = solve(items, budgets, SHRINKAGES[0])
        assert keeps(chosen.reshape(STEPS, LAYERS), allowed)
        regrets.append(predicted_error(items, chosen, SHRINKAGES[0]) / best)
    assert np.median(regrets) < 1.1


def test_the_cheapest_is_that_of_the_allowed_formats() -> None:
    allowed = np.ones((len(SET), LAYERS), dtype=bool)
    free = masked(4.0, allowed, once=False)
    allowed = allowed.copy()
    allowed[:4] = False
    dear = masked(4.0, allowed, once=False)
    assert dear.cheapest("bits") == STEPS * LAYERS * BITS[4] > free.cheapest("bits")
    assert dear.storage is not None
    assert dear.cheapest("bytes") == dear.storage.bytes[GRIDS[4]].sum() > free.cheapest("bytes")


def test_a_step_has_one_format_that_all_layers_may_have() -> None:
    allowed = np.ones((len(SET), LAYERS), dtype=bool)
    allowed[1:, 0] = False
    constraints = Constraints.by_step(masked(8.0, allowed, once=False), len(SET), LAYERS)
    sensitivity = random_sensitivity(0)
    items = items_of(sensitivity)
    errors = accumulated_errors(items).reshape(len(SET), STEPS, LAYERS).sum(axis=2)
    assert choose_stored_sets(errors, constraints).chosen.tolist() == [0] * STEPS

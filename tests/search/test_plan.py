"""The plan: candidates and the estimate of the rest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.formats import FORMATS
from adatsq_trt.search.plan import ONCE_SHRINKAGES, SHRINKAGES, Plan, make_plan
from adatsq_trt.search.sensitivity import Sensitivity

SET = tuple(FORMATS[name] for name in ("w3a3", "w4a4", "w8a8"))
BITS = np.array([3.0, 4.0, 8.0])
STEPS, LAYERS, BUDGET = 5, 6, 4.5


def random_sensitivity(seed: int) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    common, own = (torch.randn(3, steps, LAYERS, 30, generator=generator) for steps in (1, STEPS))
    size = torch.exp2(-torch.tensor(BITS))[:, None, None, None].float()
    spread = torch.exp(0.7 * torch.randn(1, STEPS, LAYERS, 1, generator=generator))
    return Sensitivity(SET, (common + own) * size * spread)


@pytest.fixture(scope="module")
def sensitivity() -> Sensitivity:
    return random_sensitivity(0)


@pytest.fixture(scope="module")
def plan(sensitivity: Sensitivity) -> Plan:
    return make_plan(sensitivity, BITS, BUDGET, 5)


def row_bits(rows: tuple[tuple[int, ...], ...], first: int = 0) -> float:
    return float(sum(BITS[i] for row in rows[first:] for i in row))


def test_the_previous_assignment_is_tried_first(plan: Plan) -> None:
    previous = (2, 1, 0, 2, 1, 0)
    found = plan.candidates(2, previous)
    assert found[0] == previous
    assert found[1] == plan.policies[0][2]
    assert found[1:] == plan.candidates(2, None)
    assert len(set(found)) == len(found)


def test_a_candidate_is_not_tried_twice(plan: Plan) -> None:
    own = plan.policies[0][3]
    assert plan.candidates(3, own).count(own) == 1
    assert set(plan.candidates(3, own)) == set(plan.candidates(3, None))


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_and_its_hedges_keep_the_budget(seed: int) -> None:
    plan = make_plan(random_sensitivity(seed), BITS, BUDGET, 4)
    for rows in (plan.policies[0], *plan.hedges):
        assert np.shape(rows) == (STEPS, LAYERS)
        assert row_bits(rows) <= BUDGET * STEPS * LAYERS + 1e-9
    # Nearly all of it is spent: no more than the smallest upgrade may be left.
    assert row_bits(plan.policies[0]) > BUDGET * STEPS * LAYERS - 4


def test_other_prices_give_richer_and_cheaper_policies(plan: Plan) -> None:
    spent = [row_bits(rows) for rows in plan.policies]
    assert min(spent) < spent[0] < max(spent)


@pytest.mark.parametrize("budget", [3.0, 8.0])
def test_extreme_budgets_leave_no_choice(sensitivity: Sensitivity, budget: float) -> None:
    plan = make_plan(sensitivity, BITS, budget, 3)
    assert row_bits(plan.policies[0]) <= budget * STEPS * LAYERS + 1e-9
    if budget == 3.0:
        assert plan.policies[0] == ((0,) * LAYERS,) * STEPS


def test_before_the_first_step_the_plans_own_error_is_expected(plan: Plan, sensitivity: Sensitivity) -> None:
    rows = np.array(plan.policies[0])[None]
    alone = float(np.take_along_axis(sensitivity.smoothed_errors().numpy(), rows, 0).sum())
    chosen = np.take_along_axis(sensitivity.contributions.double().numpy(), rows[..., None], 0)[0]
    by_layer, together = chosen.sum(axis=0), chosen.sum(axis=(0, 1))
    shrinkage = SHRINKAGES[0]
    expected = shrinkage.together * np.square(together).sum() + shrinkage.by_layer * np.square(by_layer).sum()
    assert plan.expected_error(np.zeros(30), 0) == pytest.approx(expected + shrinkage.alone * alone, rel=1e-6)


def test_after_the_last_step_the_error_so_far_is_expected(plan: Plan) -> None:
    projected = np.random.default_rng(0).normal(size=30)
    assert plan.expected_error(projected, STEPS) == pytest.approx(float(projected @ projected))


def test_a_path_that_undoes_what_the_rest_will_do_is_expected_to_err_less(plan: Plan) -> None:
    rest = plan.tail_contributions[2]
    assert plan.expected_error(-rest, 2) < plan.expected_error(rest, 2)


def test_a_rest_that_cannot_be_paid_is_infinite(plan: Plan) -> None:
    for step in range(STEPS):
        cheapest = 3.0 * LAYERS * (STEPS - step)
        own = row_bits(plan.policies[0], step)
        assert plan.deviation_error(step, cheapest - 0.5, own) == math.inf
        assert plan.deviation_error(step, cheapest, own) < math.inf
    assert plan.deviation_error(STEPS, -0.5, 0.0) == math.inf
    assert plan.deviation_error(STEPS, 0.0, 0.0) == 0.0


@given(st.integers(0, STEPS - 1), st.floats(3, 8), st.floats(3, 8))
def test_more_bits_never_mean_more_error(plan: Plan, step: int, one: float, other: float) -> None:
    entries, own = LAYERS * (STEPS - step), row_bits(plan.policies[0], step)
    fewer, more = sorted((one * entries, other * entries))
    assert plan.deviation_error(step, fewer, own) >= plan.deviation_error(step, more, own) - 1e-12


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_spending_as_planned_changes_nothing(plan: Plan, step: int) -> None:
    own = row_bits(plan.policies[0], step)
    assert plan.deviation_error(step, own, own) == 0.0


def mirrored(sensitivity: Sensitivity) -> Sensitivity:
    """Every other layer errs in the opposite direction: what layers do together changes, and nothing else."""
    signs = torch.tensor([1.0, -1.0]).repeat(LAYERS // 2)[:, None]
    return Sensitivity(SET, sensitivity.contributions * signs)


def test_with_weights_once_it_does_not_matter_what_layers_do_together() -> None:
    changed = 0
    for seed in range(4):
        given = random_sensitivity(seed)
        for shrinkages in (ONCE_SHRINKAGES, SHRINKAGES):
            plans = [make_plan(s, BITS, BUDGET, 0, shrinkages) for s in (given, mirrored(given))]
            same = plans[0].policies == plans[1].policies and plans[0].hedges == plans[1].hedges
            assert same or shrinkages is SHRINKAGES
            changed += not same
    assert changed, "with free weights it does"

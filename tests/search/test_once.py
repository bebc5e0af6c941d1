"""Weights once, beside every such policy of problems that are small enough for it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.errors import BudgetError
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.budgets import Additive, Budgets, Storage
from adatsq_trt.search.denoising import format_bits
from adatsq_trt.search.joint import Knapsack, Selection, Shrinkage, predicted_error
from adatsq_trt.search.lagrangian import Constraints, accumulated_errors, choose_stored_sets
from adatsq_trt.search.merge import Several, merged_policies
from adatsq_trt.search.once import choose_weights, grids_of
from adatsq_trt.search.plan import SHRINKAGES, Rows, make_constrained_plan
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.search.static import constrained_layer_only, constrained_time_only

SET = tuple(FORMATS[name] for name in ("w3a3", "w3a5", "w4a4", "w5a3", "w5a5"))
BITS = format_bits(SET)
GRIDS = Storage.of(SET, []).grids
STEPS, LAYERS = 2, 3
SHAPES = tuple(LayerShape(f"l{i}", 64 * (1 + i), 128, 16) for i in range(LAYERS))


def random_sensitivity(seed: int, steps: int = STEPS, layers: int = LAYERS) -> Sensitivity:
    """Weights err alike at all steps, activations of their own; steps and layers differ in sensitivity."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(SET), 1, layers, 24, generator=generator)
    activations = torch.randn(len(SET), steps, layers, 24, generator=generator)
    spread = torch.exp(torch.randn(1, steps, layers, 1, generator=generator))
    sizes = [torch.exp2(-torch.tensor(bits, dtype=torch.float32))[:, None, None, None] for bits in _widths()]
    return Sensitivity(SET, (weights * sizes[0] + activations * sizes[1]) * spread)


def _widths() -> tuple[list[int], list[int]]:
    return [fmt.weight_bits for fmt in SET], [fmt.activation_bits for fmt in SET]


def budgets_of(bits: float, share: float | None = None, steps: int = STEPS, layers: int = LAYERS) -> Budgets:
    """Mean bits, and bytes as a place between the least and the most that weights once can have."""
    limit = np.inf
    if share is not None:
        sizes = Storage.of(SET, SHAPES).bytes
        limit = float(sizes.min(axis=0).sum() + share * (sizes.max(axis=0) - sizes.min(axis=0)).sum())
    cost = np.repeat(BITS[:, None], layers, axis=1)
    return Budgets(
        steps, (Additive("bits", cost, bits * steps * layers),), Storage.of(SET, SHAPES[:layers], limit, once=True)
    )


def items_of(sensitivity: Sensitivity) -> Knapsack:
    _, steps, layers, rows = sensitivity.contributions.shape
    flat = sensitivity.contributions.double().numpy().reshape(len(SET), steps * layers, rows)
    return Knapsack(flat, np.square(flat).sum(-1), np.tile(np.arange(layers), steps), BITS, np.ones(steps * layers))


def solve(items: Knapsack, budgets: Budgets, shrinkage: Shrinkage) -> Selection:
    constraints = Constraints.each(budgets, len(SET), LAYERS)
    relaxed = choose_stored_sets(accumulated_errors(items), constraints)
    return choose_weights(items, constraints, relaxed, shrinkage)[0]


def one_grid_each(rows: Rows) -> bool:
    return all(len({GRIDS[index] for index in column}) == 1 for column in zip(*rows, strict=True))


def columns() -> list[tuple[int, ...]]:
    """All that a layer may be given over the steps."""
    every = itertools.product(range(len(SET)), repeat=STEPS)
    return [column for column in every if len({GRIDS[index] for index in column}) == 1]


EVERY_POLICY = np.array([np.stack(table, axis=1) for table in itertools.product(columns(), repeat=LAYERS)])


def best_error(items: Knapsack, budgets: Budgets, shrinkage: Shrinkage) -> float:
    """The least predicted error of all policies with weights once that keep the budgets."""
    kept = (rows for rows in EVERY_POLICY if budgets.holds(rows.tolist()))
    return min(predicted_error(items, rows.ravel(), shrinkage) for rows in kept)


@pytest.mark.parametrize("share", [None, 0.5])
def test_little_is_lost_to_the_best_of_all_policies_with_weights_once(share: float | None) -> None:
    budgets, regrets = budgets_of(4.0, share), []
    for seed in range(10):
        items = items_of(random_sensitivity(seed))
        chosen = solve(items, budgets, SHRINKAGES[0])
        assert budgets.holds(chosen.reshape(STEPS, LAYERS).tolist())
        regrets.append(predicted_error(items, chosen, SHRINKAGES[0]) / best_error(items, budgets, SHRINKAGES[0]) - 1)
    assert min(regrets) > -1e-9
    assert np.median(regrets) < 0.05
    assert np.mean(regrets) < 0.2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(3.0, 5.0), st.none() | st.floats(0.0, 1.0), st.sampled_from(SHRINKAGES))
def test_whatever_comes_out_keeps_budgets_and_one_grid_for_each_layer(
    seed: int, bits: float, share: float | None, shrinkage: Shrinkage
) -> None:
    budgets = budgets_of(bits, share)
    chosen = solve(items_of(random_sensitivity(seed)), budgets, shrinkage).reshape(STEPS, LAYERS)
    assert budgets.holds(chosen.tolist())
    assert one_grid_each(tuple(map(tuple, chosen)))


def test_a_budget_holds_no_policy_with_two_weights_of_a_layer() -> None:
    once, free = budgets_of(6.0), Storage.of(SET, SHAPES)
    changing = [(0, 0, 0), (2, 0, 0)]  # w3a3, then w4a4
    assert not once.holds(changing)
    assert Budgets(STEPS, once.additive, free).holds(changing)
    assert once.holds([(0, 2, 0), (1, 2, 1)])


@pytest.fixture(scope="module", params=[3.5, 4.5])
def planned(request: pytest.FixtureRequest) -> tuple[Sensitivity, Budgets]:
    return random_sensitivity(5, steps=6), budgets_of(request.param, steps=6)


def test_all_that_the_plan_offers_has_one_grid_for_each_layer(planned: tuple[Sensitivity, Budgets]) -> None:
    sensitivity, budgets = planned
    plan, cost, _ = make_constrained_plan(sensitivity, BITS, budgets, 4)
    for rows in (*plan.policies, *plan.hedges):
        assert one_grid_each(rows)
    assert budgets.holds(plan.policies[0])
    assert all(budgets.holds(rows) for rows in plan.hedges)
    own = plan.policies[0][0]
    for row in itertools.chain(*plan.columns):
        assert [GRIDS[i] for i in row] == [GRIDS[i] for i in own]
        assert np.isfinite(cost[list(row), range(LAYERS)]).all()


def test_a_known_policys_weights_are_a_start() -> None:
    """What is predicted of the result is never above what activations make of the known weights."""
    for seed in range(4):
        sensitivity, budgets = random_sensitivity(seed), budgets_of(3.8)
        items, constraints = items_of(sensitivity), Constraints.each(budgets, len(SET), LAYERS)
        relaxed = choose_stored_sets(accumulated_errors(items), constraints)
        for rows in constrained_layer_only(sensitivity, BITS, budgets):
            known = grids_of(constraints, np.array(rows).ravel())
            chosen, _ = choose_weights(items, constraints, relaxed, SHRINKAGES[0], [known])
            alone, _ = choose_weights(items, constraints, relaxed, SHRINKAGES[0])
            errors = [predicted_error(items, choice, SHRINKAGES[0]) for choice in (chosen, alone)]
            assert errors[0] <= errors[1]


def test_static_policies_have_weights_once(planned: tuple[Sensitivity, Budgets]) -> None:
    sensitivity, budgets = planned
    by_step = constrained_time_only(sensitivity, BITS, budgets)
    for rows in (*by_step, *constrained_layer_only(sensitivity, BITS, budgets)):
        assert budgets.holds(rows)
        assert one_grid_each(rows)
    assert all(len(set(row)) == 1 for rows in by_step for row in rows)
    affordable = {int(grid) for grid in GRIDS if BITS[grid == GRIDS].min() * 6 * LAYERS <= budgets.additive[0].limit}
    assert {int(GRIDS[rows[0][0]]) for rows in by_step} == affordable


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_merged_policies_keep_the_weights_that_they_start_with(seed: int, limit: int) -> None:
    sensitivity, budgets = random_sensitivity(seed, steps=4), budgets_of(4.0, steps=4)
    plan, _, prices = make_constrained_plan(sensitivity, BITS, budgets, 3)
    starts = [plan.policies[0], *plan.hedges]
    for rows in merged_policies(sensitivity, BITS, Several(budgets, prices), starts, limit):
        assert len(set(rows)) <= limit
        assert budgets.holds(rows)


def test_bytes_below_the_smallest_weights_are_refused() -> None:
    sensitivity = random_sensitivity(0)
    budgets = budgets_of(6.0)
    storage = Storage.of(SET, SHAPES, float(budgets.storage.bytes.min(axis=0).sum()) * 0.9, once=True)
    with pytest.raises(BudgetError, match="no policy was found"):
        make_constrained_plan(sensitivity, BITS, Budgets(STEPS, budgets.additive, storage), 3)

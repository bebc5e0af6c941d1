"""Cells of a policy in which layers run: what is not among them counts nowhere."""

import numpy as np
import pytest
import torch

from adatsq_trt.formats import format_named
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.active import cells_of, indices_of, names_of, parts, rows_of, spread
from adatsq_trt.search.budgets import Additive, Budgets, CostModel, Storage
from adatsq_trt.search.lagrangian import Constraints
from adatsq_trt.search.merge import MeanBits, merged_policies
from adatsq_trt.search.plan import make_constrained_plan, make_plan
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.search.static import layer_only, time_only, uniform

FORMATS = tuple(format_named(name) for name in ("nvfp4", "fp8", "bf16"))
BITS = np.array([fmt.bits for fmt in FORMATS])
# Two layers of the first expert, which has steps 0 and 1, and two of the second, which has steps 2 to 5.
ACTIVE = np.array([[True, True, False, False]] * 2 + [[False, False, True, True]] * 4)
SHAPES = [LayerShape(f"layer {i}", 64, 64, 8) for i in range(4)]


def make_sensitivity() -> Sensitivity:
    """Errors that fall with the bits; idle cells have none."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 0.1, 0.0])[:, None, None, None]
    values = torch.randn(3, 6, 4, 16, generator=generator) * sizes
    return Sensitivity(FORMATS, values * torch.from_numpy(ACTIVE)[None, :, :, None], 16, ACTIVE)


def test_cells_and_back() -> None:
    values = np.arange(3 * 24 * 2, dtype=np.float64).reshape(3, 6, 4, 2)
    cells = cells_of(values, ACTIVE, axis=1)
    assert cells.shape == (3, ACTIVE.sum(), 2)
    np.testing.assert_array_equal(spread(cells, ACTIVE, axis=1), np.where(ACTIVE[None, :, :, None], values, 0))
    everywhere = np.ones_like(ACTIVE)
    np.testing.assert_array_equal(spread(cells_of(values, everywhere, axis=1), everywhere, axis=1), values)


def test_experts_are_parts() -> None:
    found = [(steps.tolist(), layers.tolist()) for steps, layers in parts(ACTIVE)]
    assert found == [([0, 1], [0, 1]), ([2, 3, 4, 5], [2, 3])]


def test_names_of_idle_cells_are_none_and_come_back_as_zero() -> None:
    rows = rows_of(np.full((1, 4), 2), ACTIVE)
    names = names_of(rows, ["a", "b", "c"], ACTIVE)
    assert names[0] == ("c", "c", None, None)
    assert names[5] == (None, None, "c", "c")
    assert indices_of(names, ["a", "b", "c"]) == rows


def test_a_budget_in_bits_is_a_mean_over_the_cells_that_run() -> None:
    """Half of all cells are idle: were they counted, the others could have twice the bits."""
    sensitivity = make_sensitivity()
    for rows in make_plan(sensitivity, BITS, 8.0, 0).policies[:1]:
        spent = BITS[np.array(rows)][ACTIVE]
        assert 7.0 <= spent.mean() <= 8.0
    for proposals in (layer_only(sensitivity, BITS, 8.0), time_only(sensitivity, BITS, 8.0)):
        assert proposals
        for rows in proposals:
            assert BITS[np.array(rows)][ACTIVE].mean() <= 8.0
            assert not np.array(rows)[~ACTIVE].any()


def test_smoothing_stays_within_an_expert() -> None:
    """Cells of the second expert are a hundred times as sensitive; those of the first must not feel it."""
    base = make_sensitivity()
    louder = base.contributions.clone()
    louder[:, 2:] *= 100
    other = Sensitivity(FORMATS, louder, 16, ACTIVE)
    one, two = base.smoothed_errors().numpy(), other.smoothed_errors().numpy()
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    assert not one[:, ~ACTIVE].any()


def test_costs_count_cells_that_run() -> None:
    """One format everywhere: bytes of all layers once, activation bits as in a model without experts."""
    costs = CostModel.of(FORMATS, SHAPES, 6, ms=np.ones((3, 4)), cells=ACTIVE)
    plain = CostModel.of(FORMATS, SHAPES, 6, ms=np.ones((3, 4)))
    rows = uniform(2, 6, 4, ACTIVE)
    own, other = costs.costs(rows), plain.costs(uniform(2, 6, 4))
    assert own.resident_bytes == other.resident_bytes
    assert own.activation_bits == pytest.approx(other.activation_bits)
    assert (own.ms, other.ms) == (12, 24)


def test_a_constrained_plan_keeps_every_budget_and_one_weight_for_each_layer() -> None:
    storage = Storage.of(FORMATS, SHAPES, 3.2e4, once=True, cells=ACTIVE)
    bits = np.repeat(BITS[:, None], 4, axis=1)
    budgets = Budgets(6, (Additive("bits", bits, 9.0 * ACTIVE.sum()),), storage, None, ACTIVE)
    plan, cost, prices = make_constrained_plan(make_sensitivity(), BITS, budgets, 0)
    assert cost.shape == prices.shape == (3, 4)
    assert np.isfinite(cost).any(axis=0).all()
    rows = np.array(plan.policies[0])
    assert budgets.holds(plan.policies[0])
    for layer, own in enumerate(ACTIVE.T):
        assert len(set(rows[own, layer])) == 1
    # An idle cell in another format breaks nothing, since it is no cell.
    assert budgets.spent(rows) == budgets.spent(np.where(ACTIVE, rows, 2))


def test_steps_of_one_format_store_it_for_their_own_expert() -> None:
    storage = Storage.of(FORMATS, SHAPES, 1e9, cells=ACTIVE)
    constraints = Constraints.by_step(Budgets(6, (), storage, None, ACTIVE), 3, 4)
    assert constraints.groups.tolist() == [0, 0, 1, 1, 1, 1]
    by_expert = storage.bytes[:, [0, 1]].sum(axis=1), storage.bytes[:, [2, 3]].sum(axis=1)
    np.testing.assert_array_equal(constraints.bytes, np.stack(by_expert, axis=1))


@pytest.mark.parametrize("limit", [2, 3])
def test_merged_steps_are_of_one_expert(limit: int) -> None:
    sensitivity = make_sensitivity()
    start = make_plan(sensitivity, BITS, 8.0, 0).policies[0]
    found = merged_policies(sensitivity, BITS, MeanBits(BITS, 8.0 * ACTIVE.sum(), ACTIVE), [start], limit)
    assert found
    for rows in found:
        names = names_of(rows, [fmt.name for fmt in FORMATS], ACTIVE)
        assert len(set(names)) <= limit
        assert BITS[np.array(rows)][ACTIVE].mean() <= 8.0

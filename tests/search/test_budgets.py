"""What policies cost, and how much more than one format everywhere another needs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.costs import Costs, Limits
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape, Policy, resident_weight_bytes
from adatsq_trt.search.budgets import Additive, Budgets, CostModel, Storage

SET = tuple(FORMATS[name] for name in ("nvfp4", "fp8", "nvfp4a16", "bf16"))
SHAPES = (LayerShape("a", 64, 64, 16), LayerShape("b", 64, 256, 8), LayerShape("c", 256, 64, 1))
STEPS = 3
MS = np.array([[1.0, 2.0, 1.0], [1.5, 3.0, 1.5], [2.0, 4.0, 1.0], [2.0, 4.0, 2.0]])


def policy(rows: list[tuple[int, ...]]) -> Policy:
    names = [[SET[i].name for i in row] for row in rows]
    return Policy.from_steps("m", "0" * 64, [shape.name for shape in SHAPES], names)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=STEPS, max_size=STEPS))
def test_costs_are_those_of_the_policy(rows: list[tuple[int, ...]]) -> None:
    costs = CostModel.of(SET, SHAPES, STEPS, MS, rest_ms=0.5).costs(rows)
    same = policy(rows)
    assert costs.resident_bytes == resident_weight_bytes(same, {shape.name: shape for shape in SHAPES})
    assert costs.activation_bits == pytest.approx(same.mean_activation_bits(SHAPES))
    assert costs.ms == pytest.approx(0.5 + sum(MS[i, layer] for row in rows for layer, i in enumerate(row)))


@pytest.mark.parametrize("ms", [MS, None])
@pytest.mark.parametrize("reference", range(4))
def test_the_least_departure_is_that_of_every_single_change(ms: np.ndarray | None, reference: int) -> None:
    """A layer's weight changes at all steps, an activation at one."""
    model = CostModel.of(SET, SHAPES, STEPS, ms)
    everywhere = [(reference,) * 3] * STEPS
    own, parts = model.costs(everywhere), []
    for layer in range(3):
        for other in set(range(4)) - {reference}:
            steps = range(1) if SET[other].weight == SET[reference].weight else range(STEPS)
            rows = [list(row) for row in everywhere]
            for step in steps:
                rows[step][layer] = other
            cost = model.costs([tuple(row) for row in rows])
            parts.append(max(cost.resident_bytes / own.resident_bytes, cost.time / own.time) - 1)
    assert model.least_departure(reference, STEPS) == pytest.approx(max(min(parts), 0.0), abs=1e-12)


def test_one_format_alone_needs_nothing() -> None:
    assert CostModel.of(SET[:1], SHAPES, STEPS).least_departure(0, STEPS) == 0.0


def test_limits_are_kept_one_by_one() -> None:
    costs = Costs(resident_bytes=1000, activation_bits=6.0, ms=2.0)
    assert Limits().kept_by(9.0, costs)
    assert Limits.within(costs, 1.0).kept_by(9.0, costs)
    assert Limits(bits=9.0, bytes=1000, activation_bits=6.0, ms=2.0).kept_by(9.0, costs)
    for tight in (Limits(bits=8.9), Limits(bytes=999), Limits(activation_bits=5.9), Limits(ms=1.9)):
        assert not tight.kept_by(9.0, costs)
    assert not Limits(ms=1.0).kept_by(9.0, costs.model_copy(update={"ms": None}))


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_takes_less_of_its_budgets_than_the_bound(seed: int) -> None:
    """All policies of two steps and layers in three formats, two of which share a weight."""
    random = np.random.default_rng(seed)
    storage = Storage(np.array([0, 0, 1]), random.uniform(1, 2, (2, 2)), limit=4.0)
    additive = tuple(Additive(unit, random.uniform(1, 4, (3, 2)), 6.0) for unit in ("bits", "ms"))
    budgets = Budgets(2, additive, storage)
    rows = list(product(range(3), repeat=2))
    taken = [
        max(cost / budgets.limits()[unit] for unit, cost in budgets.spent(policy).items())
        for policy in product(rows, repeat=2)
    ]
    assert 0 < budgets.least_share() <= min(taken) * (1 + 1e-9)
    ruled_out = replace(budgets, allowed=np.array([[False, True], [True, True], [True, False]]))
    assert ruled_out.least_share() >= budgets.least_share()


def test_the_bound_finds_two_budgets_that_pull_apart() -> None:
    """Few bits take much memory, little memory many bits: each can be kept alone."""
    storage = Storage(np.array([0, 1]), np.array([[8.0], [4.0]]), limit=6.0)
    bits = Additive("bits", np.array([[8.0], [10.0]]), 8.5)
    assert 1.04 < Budgets(1, (bits,), storage).least_share() < 1.05  # at 0.74 of the one and 0.26 of the other
    assert Budgets(1, (bits,)).least_share() < 1
    assert Budgets(1, (), storage).least_share() < 1
    assert Budgets(1, (), replace(storage, limit=np.inf)).least_share() == 0

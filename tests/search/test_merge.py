"""Few assignments, against brute force on problems that are small enough for it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.budgets import Additive, Budgets, Storage
from adatsq_trt.search.joint import Shrinkage
from adatsq_trt.search.merge import ErrorModel, MeanBits, Several, merge, merged_policies
from adatsq_trt.search.plan import SHRINKAGES, Rows, make_constrained_plan, make_plan
from adatsq_trt.search.sensitivity import Sensitivity

SET = tuple(FORMATS[name] for name in ("w3a3", "w4a4", "w8a8"))
BITS = np.array([3.0, 4.0, 8.0])


def random_sensitivity(seed: int, steps: int, layers: int) -> Sensitivity:
    """One weight errs partly in the same direction at all steps; steps and layers differ in sensitivity."""
    generator = torch.Generator().manual_seed(seed)
    common, own = (torch.randn(3, n, layers, 20, generator=generator) for n in (1, steps))
    size = torch.exp2(-torch.tensor(BITS))[:, None, None, None].float()
    spread = torch.exp(0.7 * torch.randn(1, steps, layers, 1, generator=generator))
    return Sensitivity(SET, (common + own) * size * spread)


def mean_bits(sensitivity: Sensitivity, budget: float) -> MeanBits:
    steps, layers = sensitivity.contributions.shape[1:3]
    return MeanBits(BITS, budget * steps * layers)


def error_model(sensitivity: Sensitivity, budget: float, shrinkage: Shrinkage = SHRINKAGES[0]) -> ErrorModel:
    return ErrorModel.of(sensitivity, BITS, mean_bits(sensitivity, budget), shrinkage)


def random_model(
    seed: int, steps: int = 4, layers: int = 2, budget: float = 4.5, shrinkage: Shrinkage = SHRINKAGES[0]
) -> ErrorModel:
    return error_model(random_sensitivity(seed, steps, layers), budget, shrinkage)


def total_bits(model: ErrorModel) -> float:
    assert isinstance(model.allowance, MeanBits)
    return model.allowance.total


def merged(model: ErrorModel, rows: Rows, limit: int) -> Rows:
    found = merge(model, rows, limit)
    assert found is not None, "bits alone can always be kept"
    return found


def random_rows(seed: int, steps: int = 4, layers: int = 2) -> Rows:
    table = np.random.default_rng(seed).integers(0, 3, (steps, layers))
    return tuple(tuple(int(i) for i in row) for row in table)


def brute_force(model: ErrorModel, limit: int) -> float:
    """The least error of all policies of so many assignments that keep the budget."""
    _, steps, layers = model.errors.shape
    assignments = np.array(list(itertools.product(range(len(BITS)), repeat=layers)))
    least = np.inf
    for table in itertools.combinations(assignments, limit):
        for labels in itertools.product(range(limit), repeat=steps):
            chosen = np.stack(table)[list(labels)]
            if BITS[chosen].sum() <= total_bits(model) + 1e-9:
                least = min(least, model.error(chosen))
    return least


seeds, limits = st.integers(0, 1000), st.integers(1, 4)


@settings(deadline=None, max_examples=25)
@given(seeds, limits, st.sampled_from([*SHRINKAGES, Shrinkage(0.0, 0.0)]), st.floats(3.0, 9.0))
def test_limit_and_budget_hold_wherever_it_starts(seed: int, limit: int, shrinkage: Shrinkage, budget: float) -> None:
    model = random_model(seed, budget=budget, shrinkage=shrinkage)
    rows = merged(model, random_rows(seed), limit)
    assert len(set(rows)) <= limit
    assert BITS[np.asarray(rows)].sum() <= total_bits(model) + 1e-9


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_a_policy_that_keeps_the_limit_never_gets_worse(seed: int) -> None:
    rows = random_rows(seed)
    model = random_model(seed, budget=float(BITS[np.asarray(rows)].mean()))
    found = merged(model, rows, 4)
    assert model.error(np.asarray(found)) <= model.error(np.asarray(rows)) * (1 + 1e-12)


def regrets(limit: int) -> list[float]:
    """Error of what is found from the plan's policies, relative to the best there is."""
    found = []
    for seed in range(10):
        sensitivity = random_sensitivity(seed, 4, 2)
        plan, model = make_plan(sensitivity, BITS, 4.5, 3), random_model(seed)
        starts = [*plan.policies, *plan.hedges]
        found_policies = merged_policies(sensitivity, BITS, mean_bits(sensitivity, 4.5), starts, limit)
        reached = min(model.error(np.asarray(rows)) for rows in found_policies)
        found.append(reached / brute_force(model, limit))
    return found


@pytest.mark.parametrize(("limit", "mean"), [(1, 1.001), (2, 1.06)])
def test_it_comes_near_to_brute_force(limit: int, mean: float) -> None:
    found = regrets(limit)
    assert min(found) >= 1 - 1e-9
    assert np.mean(found) < mean
    assert np.median(found) < 1.001


def test_more_assignments_cost_less() -> None:
    limits, relative = (1, 2, 4, 8), []
    for seed in range(4):
        sensitivity = random_sensitivity(seed, 8, 6)
        model, start = error_model(sensitivity, 4.5), make_plan(sensitivity, BITS, 4.5, 3).policies[0]
        unlimited = model.error(np.asarray(start))
        relative.append([model.error(np.asarray(merged(model, start, limit))) / unlimited for limit in limits])
    errors = np.mean(relative, axis=0).tolist()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


def test_steps_that_want_the_same_share_an_assignment() -> None:
    """Two kinds of steps that alternate: two assignments lose nothing."""
    kinds = torch.tensor([[1.0, 0.01], [0.01, 1.0]])
    spread = kinds.repeat(3, 1)[None, :, :, None] * torch.exp2(-torch.tensor(BITS))[:, None, None, None].float()
    signs = torch.randn(1, 6, 2, 40, generator=torch.Generator().manual_seed(0)).sign()
    sensitivity = Sensitivity(SET, spread * signs)
    model = error_model(sensitivity, 5.5, Shrinkage(0.0, 0.0))
    rows = merged(model, make_plan(sensitivity, BITS, 5.5, 3).policies[0], 2)
    assert rows == ((2, 0), (0, 2)) * 3


SHAPES = tuple(LayerShape(f"layer {i}", 64, 64 * (i + 1), 8) for i in range(3))


def several_budgets(steps: int, bits: float, size: float, time: float) -> Budgets:
    """Mean bits, bytes as a part of those of all formats together, and a time that grows with bits."""
    layers = len(SHAPES)
    storage = Storage.of(SET, SHAPES, np.inf)
    ms = np.sqrt(BITS)[:, None] * np.array([1.0, 3.0, 2.0])
    return Budgets(
        steps,
        (
            Additive("bits", np.repeat(BITS[:, None], layers, axis=1), bits * steps * layers),
            Additive("ms", ms, time * steps * float(ms.max(axis=0).sum())),
        ),
        replace(storage, limit=size * float(storage.bytes.sum())),
    )


@settings(deadline=None, max_examples=20)
@given(seeds, limits, st.floats(4.0, 7.0), st.floats(0.35, 1.0), st.floats(0.75, 1.0))
def test_limit_and_several_budgets_hold_together(seed: int, limit: int, bits: float, size: float, time: float) -> None:
    sensitivity, budgets = random_sensitivity(seed, 4, 3), several_budgets(4, bits, size, time)
    plan, _, prices = make_constrained_plan(sensitivity, BITS, budgets, 3)
    starts = [*plan.policies, *plan.hedges, random_rows(seed, 4, 3)]
    for rows in merged_policies(sensitivity, BITS, Several(budgets, prices), starts, limit):
        assert len(set(rows)) <= limit
        assert budgets.holds(rows)


def test_under_several_budgets_it_comes_near_to_brute_force() -> None:
    """All policies of two assignments of three layers at three steps that keep bits, bytes and a time together."""
    assignments = [tuple(row) for row in itertools.product(range(len(BITS)), repeat=3)]
    found = []
    for seed in range(8):
        sensitivity, budgets = random_sensitivity(seed, 3, 3), several_budgets(3, 5.0, 0.6, 0.85)
        plan, _, prices = make_constrained_plan(sensitivity, BITS, budgets, 3)
        allowance = Several(budgets, prices)
        model = ErrorModel.of(sensitivity, BITS, allowance, SHRINKAGES[0])
        starts = [*plan.policies, *plan.hedges]
        reached = min(model.error(np.asarray(r)) for r in merged_policies(sensitivity, BITS, allowance, starts, 2))
        every = (
            tuple(pair[i] for i in labels)
            for pair in itertools.combinations(assignments, 2)
            for labels in itertools.product(range(2), repeat=3)
        )
        least = min(model.error(np.asarray(rows)) for rows in dict.fromkeys(every) if budgets.holds(rows))
        found.append(reached / least)
    assert min(found) >= 1 - 1e-9
    assert np.median(found) < 1.15

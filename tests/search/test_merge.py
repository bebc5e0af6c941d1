"""Few assignments, against brute force on problems that are small enough for it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.formats import FORMATS
from adatsq_trt.search.joint import Shrinkage
from adatsq_trt.search.merge import ErrorModel, merge, merged_policies
from adatsq_trt.search.plan import SHRINKAGES, Rows, make_plan
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


def random_model(
    seed: int, steps: int = 4, layers: int = 2, budget: float = 4.5, shrinkage: Shrinkage = SHRINKAGES[0]
) -> ErrorModel:
    return ErrorModel.of(random_sensitivity(seed, steps, layers), BITS, budget, shrinkage)


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
            if BITS[chosen].sum() <= model.total_bits + 1e-9:
                least = min(least, model.error(chosen))
    return least


seeds, limits = st.integers(0, 1000), st.integers(1, 4)


@settings(deadline=None, max_examples=25)
@given(seeds, limits, st.sampled_from([*SHRINKAGES, Shrinkage(0.0, 0.0)]), st.floats(3.0, 9.0))
def test_limit_and_budget_hold_wherever_it_starts(seed: int, limit: int, shrinkage: Shrinkage, budget: float) -> None:
    model = random_model(seed, budget=budget, shrinkage=shrinkage)
    rows = merge(model, random_rows(seed), limit)
    assert len(set(rows)) <= limit
    assert BITS[np.asarray(rows)].sum() <= model.total_bits + 1e-9


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_a_policy_that_keeps_the_limit_never_gets_worse(seed: int) -> None:
    rows = random_rows(seed)
    model = random_model(seed, budget=float(BITS[np.asarray(rows)].mean()))
    merged = merge(model, rows, 4)
    assert model.error(np.asarray(merged)) <= model.error(np.asarray(rows)) * (1 + 1e-12)


def regrets(limit: int) -> list[float]:
    """Error of what is found from the plan's policies, relative to the best there is."""
    found = []
    for seed in range(10):
        sensitivity = random_sensitivity(seed, 4, 2)
        plan, model = make_plan(sensitivity, BITS, 4.5, 3), random_model(seed)
        starts = [*plan.policies, *plan.hedges]
        reached = min(model.error(np.asarray(r)) for r in merged_policies(sensitivity, BITS, 4.5, starts, limit))
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
        model, start = (
            ErrorModel.of(sensitivity, BITS, 4.5, SHRINKAGES[0]),
            make_plan(sensitivity, BITS, 4.5, 3).policies[0],
        )
        unlimited = model.error(np.asarray(start))
        relative.append([model.error(np.asarray(merge(model, start, limit))) / unlimited for limit in limits])
    errors = np.mean(relative, axis=0).tolist()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


def test_steps_that_want_the_same_share_an_assignment() -> None:
    """Two kinds of steps that alternate: two assignments lose nothing."""
    kinds = torch.tensor([[1.0, 0.01], [0.01, 1.0]])
    spread = kinds.repeat(3, 1)[None, :, :, None] * torch.exp2(-torch.tensor(BITS))[:, None, None, None].float()
    signs = torch.randn(1, 6, 2, 40, generator=torch.Generator().manual_seed(0)).sign()
    sensitivity = Sensitivity(SET, spread * signs)
    model = ErrorModel.of(sensitivity, BITS, 5.5, Shrinkage(0.0, 0.0))
    rows = merge(model, make_plan(sensitivity, BITS, 5.5, 3).policies[0], 2)
    assert rows == ((2, 0), (0, 2)) * 3

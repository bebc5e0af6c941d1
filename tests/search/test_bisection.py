"""The baseline that bisects the trajectory, on errors that add up and on some that do not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.search.bisection import bisected_policy, step_errors
from adatsq_trt.search.plan import Rows

BITS = np.array([3.0, 4.0, 6.0])


class Runs:
    """Errors of intervals that add up exactly, and how often they were asked for."""

    def __init__(self, errors: np.ndarray) -> None:
        self.errors, self.count = errors, 0

    def interval(self, first: int, last: int) -> float:
        self.count += 1
        return float(self.errors[first:last].sum())

    def policy(self, rows: Rows) -> float:
        """Of one format for each step, [formats, steps]."""
        self.count += 1
        return float(sum(self.errors[row[0], step] for step, row in enumerate(rows)))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24))
def test_as_many_runs_as_steps_find_the_error_of_each(errors: list[int]) -> None:
    runs = Runs(np.array(errors, dtype=np.float64))
    found = step_errors(runs.interval, len(errors), len(errors))
    assert found.tolist() == pytest.approx(errors)
    assert runs.count <= len(errors)


@given(st.integers(0, 1000), st.integers(1, 8))
def test_fewer_runs_look_where_the_error_is_and_keep_its_sum(seed: int, most: int) -> None:
    errors = np.exp(np.random.default_rng(seed).normal(0, 2, 16))
    runs = Runs(errors)
    found = step_errors(runs.interval, 16, most)
    assert runs.count <= most
    assert found.sum() == pytest.approx(errors.sum())


def test_one_sharp_peak_is_found_with_few_runs() -> None:
    errors = np.full(32, 0.01)
    errors[21] = 5.0
    found = step_errors(Runs(errors).interval, 32, 6)
    assert int(found.argmax()) in (20, 21)
    assert found.max() > 2


@pytest.mark.parametrize("budget", [3.0, 3.7, 4.0, 5.5, 6.0])
def test_the_policy_keeps_the_budget_and_is_the_best_where_errors_add_up(budget: float) -> None:
    steps, layers = 4, 3
    sensitivity = np.array([1.0, 8.0, 2.0, 0.5])
    runs = Runs(np.exp2(-2 * BITS)[:, None] * sensitivity)
    rows = bisected_policy(runs.policy, BITS, budget, steps, layers, runs=steps)
    assert all(len(set(row)) == 1 and len(row) == layers for row in rows)
    assert np.mean([BITS[row[0]] for row in rows]) <= budget + 1e-9
    assert runs.count <= 1 + 2 * steps
    every = np.stack(np.meshgrid(*[range(3)] * steps, indexing="ij"), axis=-1).reshape(-1, steps)
    kept = every[BITS[every].mean(axis=1) <= budget + 1e-9]
    best = min(runs.policy(tuple((int(i),) * layers for i in indices)) for indices in kept)
    assert runs.policy(rows) <= 1.3 * best

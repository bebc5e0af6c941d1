"""The beam against brute force, and its rules one by one."""

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from adatsq_trt.search.beam import Path, Pruning, beam_search, expand, prune
from adatsq_trt.search.candidates import Assignment

Rows = tuple[Assignment, ...]
EVERYTHING = Pruning(None, None)


@pytest.fixture(scope="module")
def problems(regret: ModuleType) -> Any:
    return regret.seeded_problems()


def test_without_pruning_the_beam_is_brute_force(regret: ModuleType) -> None:
    for seed in range(8):
        dynamics = regret.Dynamics.random(seed)
        policies = itertools.product(regret.ALL_ASSIGNMENTS, repeat=3)
        errors: dict[Rows, float] = {}
        for rows in policies:
            state = dynamics.start
            for step, row in enumerate(rows):
                state = dynamics.step(state, step, row)
            if regret.BITS[np.array(rows)].mean() <= dynamics.budget + 1e-9:
                errors[rows] = dynamics.error(state)
        paths = beam_search(regret.SmallProblem(dynamics, None), EVERYTHING)
        assert {path.assignments for path in paths} == set(errors)
        assert paths[0].assignments == min(errors, key=errors.__getitem__)
        assert [path.error for path in paths] == pytest.approx(sorted(errors.values()), rel=1e-9)
        assert dynamics.best_error() == pytest.approx(paths[0].error, rel=1e-9)


def test_the_small_problems_are_not_additive(problems: Any) -> None:
    """Else the plan alone would be optimal and the regret would say nothing."""
    worse = [d.error(_run(d, d.plan(1).policies[0])) / best - 1 for d, best in problems]
    assert np.mean(worse) > 0.1


def _run(dynamics: Any, rows: Rows) -> Any:
    state = dynamics.start
    for step, row in enumerate(rows):
        state = dynamics.step(state, step, row)
    return state


def test_mean_regret_at_the_default_settings_is_under_five_per_cent(regret: ModuleType, problems: Any) -> None:
    assert regret.DEFAULTS.beam is not None
    measured = regret.regrets(regret.DEFAULTS, problems)
    assert measured.min() > -1e-9
    assert measured.mean() < 0.05
    # A beam of one is worse: the width does something.
    assert regret.regrets(regret.Selection(1, 5, 0.1), problems).mean() > 2 * measured.mean()


def test_fewer_expansions_cost_some_regret_and_not_much(regret: ModuleType, problems: Any) -> None:
    """Out of up to 24 in a column: the predictions that choose them are worth having."""
    defaults = regret.DEFAULTS
    chosen = [regret.Selection(defaults.beam, defaults.candidates, defaults.slack, most) for most in (1, 4, 8)]
    means = [float(regret.regrets(choice, problems).mean()) for choice in chosen]
    assert means[0] > 1.5 * means[1]
    assert means[1] < 0.12
    assert means[2] < 0.08


def test_every_path_keeps_the_budget(problems: Any, regret: ModuleType) -> None:
    for dynamics, _ in problems[:20]:
        for path in beam_search(regret.SmallProblem(dynamics, 4), Pruning(4, 0.1)):
            assert path.bits == regret.BITS[np.array(path.assignments)].sum() <= dynamics.budget * 6 + 1e-9
            assert path.error == pytest.approx(dynamics.error(_run(dynamics, path.assignments)))


def test_a_search_goes_on_from_any_column(problems: Any, regret: ModuleType) -> None:
    problem, columns = regret.SmallProblem(problems[3][0], 4), {}
    whole = beam_search(problem, Pruning(4, 0.1), on_column=lambda step, paths: columns.__setitem__(step, list(paths)))
    assert sorted(columns) == [0, 1, 2]
    for column in (0, 1, 2):
        seen: list[int] = []
        again = beam_search(problem, Pruning(4, 0.1), columns[column], lambda step, _, seen=seen: seen.append(step))
        assert [p.assignments for p in again] == [p.assignments for p in whole]
        assert seen == list(range(column + 1, 3))


def path(bits: float, error: float, estimate: float | None = None, rows: Rows = ()) -> Path[None]:
    return Path(None, rows, bits, error, error if estimate is None else estimate)


def test_a_path_that_costs_more_and_promises_less_is_dropped() -> None:
    paths = [path(10, 1.0), path(12, 1.05), path(12, 1.2), path(14, 0.5)]
    assert prune(paths, Pruning(None, 0.0)) == [paths[3], paths[0]]
    assert prune(paths, Pruning(None, 0.1)) == [paths[3], paths[0], paths[1]]
    assert len(prune(paths, EVERYTHING)) == 4


def test_paths_are_compared_by_what_they_will_lead_to() -> None:
    # The second one spent bits that the rest lacks now.
    careful, spender = path(10, 2.0, estimate=3.0), path(14, 1.0, estimate=5.0)
    assert prune([spender, careful], Pruning(None, 0.1)) == [careful]


def test_half_of_the_places_go_to_the_best_and_half_to_the_loneliest() -> None:
    paths = [path(10 + i, 1.0 - 0.01 * i) for i in range(10)] + [path(5, 40.0), path(7, 20.0), path(40, 0.8)]
    kept = prune(paths, Pruning(4, None))
    assert len(kept) == 4
    assert kept[:2] == sorted(paths, key=lambda p: p.estimate)[:2]
    assert path(5, 40.0) in kept


@pytest.mark.parametrize("width", [1, 2, 3, 5, 30])
def test_no_more_paths_than_the_width_and_the_best_among_them(width: int) -> None:
    rng = np.random.default_rng(width)
    paths = [path(float(rng.integers(10, 20)), float(rng.exponential())) for _ in range(20)]
    for slack in (None, 0.0, 0.1):
        kept = prune(paths, Pruning(width, slack))
        assert 1 <= len(kept) <= min(width, 20)
        assert kept[0] == min(paths, key=lambda p: p.estimate)


def test_among_equals_the_one_with_fewer_switches_wins() -> None:
    switching = path(8, 1.0, rows=((0, 0), (1, 1), (0, 0)))
    steady = path(8, 1.0, rows=((0, 1), (0, 1), (0, 1)))
    assert (switching.switches, steady.switches) == (2, 0)
    for order in ([switching, steady], [steady, switching]):
        assert prune(order, Pruning(1, None)) == [steady]
        assert prune(order, Pruning(None, 0.0)) == [steady]


class Refusing:
    """Two steps, formats of 1 and 5 bits, 6 bits in all; counts its calls."""

    steps = 2

    def __init__(self) -> None:
        self.calls: list[tuple[int, Assignment]] = []

    def start(self) -> int:
        return 0

    @property
    def cheapest(self) -> Assignment:
        return (0,)

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        return [(0,), (1,)]

    def bits(self, assignment: Assignment) -> float:
        return (1.0, 5.0)[assignment[0]]

    def advance(self, step: int, moves: Sequence[tuple[int, Assignment]]) -> list[int]:
        self.calls += [(step, assignment) for _, assignment in moves]
        return [state + (3, 1)[assignment[0]] for state, assignment in moves]

    def predicted_errors(self, state: int, step: int, assignments: Sequence[Assignment]) -> list[float]:
        return [float(state + (3, 1)[assignment[0]]) for assignment in assignments]

    def error(self, state: int, step: int) -> float:
        return float(state)

    def fits(self, assignments: Sequence[Assignment]) -> bool:
        return True

    def remaining_error(self, step: int, bits: float) -> float:
        return 0.0 if bits + (self.steps - step) <= 6 else float("inf")


class OnlyDear(Refusing):
    """Offers nothing but the dear format."""

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        return [(1,)]


def test_a_path_that_affords_no_candidate_goes_on_with_the_cheapest() -> None:
    paths = beam_search(OnlyDear(), Pruning(1, None))
    assert [p.assignments for p in paths] == [((1,), (0,))]


def test_paths_that_cannot_meet_the_budget_cost_no_call() -> None:
    problem = Refusing()
    paths = beam_search(problem, EVERYTHING)
    assert {p.assignments for p in paths} == {((0,), (0,)), ((0,), (1,)), ((1,), (0,))}
    assert [p.error for p in paths] == [4.0, 4.0, 6.0]
    assert len(problem.calls) == 2 + 3


def test_expanding_leaves_the_parents_alone() -> None:
    problem, parent = Refusing(), Path(0, (), 0.0, 0.0, 0.0)
    children = expand(problem, [parent], 0)
    assert [(c.state, c.assignments, c.bits) for c in children] == [(3, ((0,),), 1.0), (1, ((1,),), 5.0)]
    assert parent == Path(0, (), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("most", [1, 2])
def test_only_the_most_promising_expansions_run(most: int) -> None:
    problem = Refusing()
    paths = beam_search(problem, Pruning(None, None, expansions=most))
    assert [sum(step == column for step, _ in problem.calls) for column in (0, 1)] == [most, most]
    # Both ways to spend the one dear step have the least error there is; one of them is found with single expansions.
    assert paths[0].error == 4.0


def test_predictions_only_choose_what_runs() -> None:
    class Mistaken(Refusing):
        def predicted_errors(self, state: int, step: int, assignments: Sequence[Assignment]) -> list[float]:
            return [-error for error in super().predicted_errors(state, step, assignments)]

    problem = Mistaken()
    assert [path.error for path in beam_search(problem, Pruning(None, None, expansions=1))] == [6.0]
    assert len(problem.calls) == 2


def test_the_plan_predicts_what_a_step_adds(problems: Any, regret: ModuleType) -> None:
    """Where errors are small: then first order is all there is."""
    dynamics = problems[0][0]
    small = regret.Dynamics(dynamics.matrices, 1e-3 * dynamics.errors, dynamics.cross, dynamics.budget)
    problem, plan = regret.SmallProblem(small, 2), small.plan(2)
    state = problem.start()
    for step, row in enumerate(((0, 1), (2, 0))):
        before = problem.projected(state, step) * plan.row_weights
        (state,) = problem.advance(step, [(state, row)])
        after = problem.projected(state, step + 1) * plan.row_weights
        added = plan.contributions[list(row), step, [0, 1]].sum(axis=0)
        assert np.linalg.norm(after - before - added) < 0.02 * np.linalg.norm(added)

"""Beam search over denoising steps (paper, section 3.2).

A column per step, a candidate assignment per node. Every path carries its own state, so what a step is measured on
contains what the earlier steps did. An expansion, a path with a candidate, is a denoiser call. Each column is pruned:

0. Where only so many expansions may run, those are run that rule 3 would keep by their predicted errors.
1. A path that cannot meet the budget even with the cheapest rest is dropped.
2. A path is dropped when another has no more bits and an estimated final error smaller by more than `slack`. The
   estimate, not the error so far, is compared: a path that spent more has less error but leaves less for the rest.
3. Of the others, at most `width` are left. Half of the places go to the least estimated final error, the other half to
   the largest crowding distance along the front. Among equals a path that keeps the previous assignment wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Protocol, TypeVar

from adatsq_trt.search.candidates import Assignment
from adatsq_trt.search.pareto import crowding_distance, front

StateT = TypeVar("StateT")
OtherT = TypeVar("OtherT")


class Problem(Protocol[StateT]):
    """Interface between the beam and the problem that it searches."""

    @property
    def steps(self) -> int:
        """Number of columns."""

    def start(self) -> StateT:
        """State before the first step."""

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        """Assignments worth trying at a step after another."""

    @property
    def cheapest(self) -> Assignment:
        """The assignment with the fewest bits: it always fits, since paths that could not afford it are dropped."""

    def bits(self, assignment: Assignment) -> float:
        """Cost of an assignment at one step."""

    def advance(self, step: int, moves: Sequence[tuple[StateT, Assignment]]) -> Iterable[StateT]:
        """States after the step, one for each state before it and its assignment: one denoiser call each."""

    def predicted_errors(self, state: StateT, step: int, assignments: Sequence[Assignment]) -> Sequence[float]:
        """Predict what `error` will be after this step with each of these assignments, without a denoiser call."""

    def error(self, state: StateT, step: int) -> float:
        """Final error that the state after `step` steps is expected to lead to."""

    def fits(self, assignments: Sequence[Assignment]) -> bool:
        """Whether a prefix leaves enough of budgets that do not add up to one cost; others are `remaining_error`'s."""

    def remaining_error(self, step: int, bits: float) -> float:
        """Estimate how the bits spent so far change that error; infinite when the budget cannot hold the rest."""


@dataclass(frozen=True)
class Path(Generic[StateT]):
    """A prefix of a policy.

    Attributes:
        state: the problem's state after these steps.
        assignments: one per step.
        bits: their cost.
        error: final error that they are expected to lead to.
        estimate: the same, corrected for the bits that are left for the rest.
    """

    state: StateT
    assignments: tuple[Assignment, ...]
    bits: float
    error: float
    estimate: float

    @property
    def switches(self) -> int:
        """How often the assignment changes: one less than the number of buckets."""
        return sum(a != b for a, b in zip(self.assignments, self.assignments[1:], strict=False))


Move = tuple[Path[StateT], Assignment]


@dataclass(frozen=True)
class Pruning:
    """How columns are thinned.

    Attributes:
        width: paths kept per column; None keeps all.
        slack: relative slack of dominance; None switches dominance off.
        expansions: run per column, the most promising ones; None runs all.
    """

    width: int | None
    slack: float | None
    expansions: int | None = None


def beam_search(
    problem: Problem[StateT],
    pruning: Pruning,
    paths: Sequence[Path[StateT]] | None = None,
    on_column: Callable[[int, Sequence[Path[StateT]]], None] | None = None,
) -> list[Path[StateT]]:
    """Complete paths, the least error first.

    Args:
        problem: the one that is searched.
        pruning: how columns are thinned.
        paths: prefixes to go on from (all of the same length), or None for the start.
        on_column: called with the step and the paths that survived it.
    """
    survivors = list(paths) if paths else [Path(problem.start(), (), 0.0, 0.0, 0.0)]
    for step in range(len(survivors[0].assignments), problem.steps):
        survivors = prune(expand(problem, survivors, step, pruning.expansions), pruning)
        if on_column is not None:
            on_column(step, survivors)
    return sorted(survivors, key=lambda path: (path.error, path.switches))


def most_expansions(steps: int, candidates: int, pruning: Pruning) -> int:
    """Count the expansions of a search whose every path has all its candidates and the assignment before.

    Args:
        steps: number of columns.
        candidates: distinct assignments of a column.
        pruning: how columns are thinned; `width` is a number.
    """
    assert pruning.width is not None, "without a width there is no most"
    first, other = candidates, pruning.width * (candidates + 1)
    if pruning.expansions is not None:
        first, other = min(first, pruning.expansions), min(other, pruning.expansions)
    return first + (steps - 1) * other


def expand(
    problem: Problem[StateT], paths: Sequence[Path[StateT]], step: int, most: int | None = None
) -> list[Path[StateT]]:
    """Feasible successors, the cheapest one where none of the candidates fits: one denoiser call each.

    Args:
        problem: the one that is searched.
        paths: to go on from.
        step: the one that they take.
        most: successors, if not all.
    """
    options = [(path, _feasible(problem, path, step)) for path in paths]
    moves = [(path, assignment) for path, assignments in options for assignment in assignments]
    if most is not None and len(moves) > most:
        errors = [problem.predicted_errors(path.state, step, assignments) for path, assignments in options]
        moves = _promising(problem, moves, list(chain(*errors)), step, most)
    states = problem.advance(step, [(path.state, assignment) for path, assignment in moves])
    return [
        _successor(problem, *move, step, state, problem.error(state, step + 1))
        for move, state in zip(moves, states, strict=True)
    ]


def _promising(
    problem: Problem[StateT], moves: Sequence[Move[StateT]], errors: Sequence[float], step: int, most: int
) -> list[Move[StateT]]:
    """Those that pruning would keep if they had these errors."""
    numbered = enumerate(zip(moves, errors, strict=True))
    predicted = [_successor(problem, *move, step, index, error) for index, (move, error) in numbered]
    return [moves[index] for index in sorted(path.state for path in prune(predicted, Pruning(most, None)))]


def _successor(
    problem: Problem[StateT], path: Path[StateT], assignment: Assignment, step: int, state: OtherT, error: float
) -> Path[OtherT]:
    """A path with one more step, after which it has this state and is expected to end with this error."""
    bits, rest = path.bits + problem.bits(assignment), _rest(problem, path, assignment, step)
    return Path(state, (*path.assignments, assignment), bits, error, error + rest)


def _feasible(problem: Problem[StateT], path: Path[StateT], step: int) -> Sequence[Assignment]:
    """List the assignments that a path can take at a step; the cheapest where none fits."""
    options = problem.candidates(step, path.assignments[-1] if path.assignments else None)
    affordable = [option for option in options if _rest(problem, path, option, step) < math.inf]
    feasible = [option for option in affordable if problem.fits((*path.assignments, option))]
    return feasible or [problem.cheapest]


def _rest(problem: Problem[StateT], path: Path[StateT], assignment: Assignment, step: int) -> float:
    return problem.remaining_error(step + 1, path.bits + problem.bits(assignment))


def prune(paths: Sequence[Path[StateT]], pruning: Pruning) -> list[Path[StateT]]:
    """At most `width` paths: rules 2 and 3."""
    ranked = sorted(paths, key=lambda path: (path.estimate, path.switches))
    if pruning.slack is not None:
        ranked = [ranked[i] for i in front([(p.bits, p.estimate) for p in ranked], pruning.slack)]
    if pruning.width is None or len(ranked) <= pruning.width:
        return ranked
    leaders = (pruning.width + 1) // 2
    rest = ranked[leaders:]
    distance = crowding_distance([(p.bits, p.estimate) for p in rest])
    diverse = sorted(range(len(rest)), key=lambda i: (-distance[i], i))[: pruning.width - leaders]
    return ranked[:leaders] + [rest[i] for i in sorted(diverse)]

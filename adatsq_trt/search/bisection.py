"""A baseline: precision for whole steps, found with few runs because errors of steps are taken to add up.

TMPDiff (Lewandowski et al. 2026, arXiv 2603.14062) gives every step one precision for all layers, takes the errors of
steps as additive, and bisects the trajectory, so that the number of runs grows with the number of steps and not with
that of policies. This is that idea as its abstract has it:

1. The error of an interval of steps in a format is measured with the dearest format at all other steps.
2. The interval with the largest error is halved; one half is measured, the other has the rest.
3. A step's error is its interval's, divided by its length; formats are allocated to steps within the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from adatsq_trt.search.candidates import Array, allocate
from adatsq_trt.search.plan import Rows

Measure = Callable[[Rows], float]


def step_errors(measure: Callable[[int, int], float], steps: int, runs: int) -> Array:
    """Errors of single steps [steps], if those of intervals add up.

    Args:
        measure: the error of the steps from one to before another; a run each.
        steps: of the trajectory.
        runs: most of them; with as many as there are steps every step has its own error.
    """
    whole = measure(0, steps)
    heap, runs = [(-whole, 0, steps)], runs - 1
    finished: list[tuple[float, int, int]] = []
    while heap and runs > 0:
        negative, first, last = heapq.heappop(heap)
        if last - first == 1:
            finished.append((negative, first, last))
            continue
        middle, runs = (first + last) // 2, runs - 1
        half = min(max(measure(first, middle), 0.0), -negative)
        heapq.heappush(heap, (-half, first, middle))
        heapq.heappush(heap, (negative + half, middle, last))
    errors = np.empty(steps)
    for negative, first, last in [*heap, *finished]:
        errors[first:last] = -negative / (last - first)
    return errors


def bisected_policy(measure: Measure, bits: Array, budget: float, steps: int, layers: int, runs: int) -> Rows:
    """A policy with one format for all layers of a step.

    Args:
        measure: latent MSE of a policy.
        bits: [formats], ascending; the last is what the others are measured beside.
        budget: mean bits; at least the cheapest format's.
        steps: of the trajectory.
        layers: of the model.
        runs: most of them for each format but the last.
    """

    def policy(indices: np.ndarray) -> Rows:
        return tuple((int(index),) * layers for index in indices)

    dearest = len(bits) - 1
    floor = measure(policy(np.full(steps, dearest)))
    errors = np.zeros((len(bits), steps))
    for fmt in range(dearest):

        def interval(first: int, last: int, fmt: int = fmt) -> float:
            indices = np.full(steps, dearest)
            indices[first:last] = fmt
            return max(measure(policy(indices)) - floor, 0.0)

        errors[fmt] = step_errors(interval, steps, runs)
    return policy(allocate(errors, bits, np.ones(steps), budget * steps))

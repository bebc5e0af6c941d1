"""Cost of the beam's pruning: its error against brute force on 200 seeded problems that are small enough for both.

    python benchmarks/search/regret.py

A problem has 3 steps, 2 layers and the formats of the set `paper` (3, 4 and 8 bits). As in the real search a state is a
batch: each of its samples is a deviation x from a full-precision path, x[t+1] = A_t tanh(x[t]) + e_t(assignment), and a
policy's error is the mean of |x_T|². The vector e_t is the sum of both layers' errors and of their product, and a layer
errs partly the same way at every step, so errors neither add nor stay apart. Candidates, the guide and the estimate of
the rest are those of the real search's plan.

The fewer numbers a state has, the more the optimum owes to chance cancellation, which no estimate from single errors
can foresee: the figures for batches of 1 and 4 samples show that. Writes regret.json beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from adatsq_trt.formats import FORMAT_SETS, FORMATS
from adatsq_trt.search.beam import Pruning, beam_search
from adatsq_trt.search.candidates import Array, Assignment
from adatsq_trt.search.denoising import format_bits
from adatsq_trt.search.plan import Plan, make_plan
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.settings import Settings

STEPS, LAYERS, WIDTH = 3, 2, 6
BATCH = 16
SET = tuple(FORMATS[name] for name in FORMAT_SETS["paper"])
BITS = format_bits(SET)
BUDGETS = (4.0, 4.5, 5.0, 6.0)  # mean bits; problem n has the n-th of them in turn
PROBLEMS = 200
ALL_ASSIGNMENTS: tuple[Assignment, ...] = tuple(itertools.product(range(len(SET)), repeat=LAYERS))


@dataclass(frozen=True)
class Dynamics:
    """A random denoising loop.

    Attributes:
        matrices: A, [steps, width, width].
        errors: of each format at each step and layer, [formats, steps, layers, batch, width].
        cross: weight of the product of both layers' errors, [steps].
        budget: mean bits.
    """

    matrices: Array
    errors: Array
    cross: Array
    budget: float

    @classmethod
    def random(cls, seed: int, batch: int = BATCH) -> Dynamics:
        """Errors of 2^-bits in size, half of their variance common to all steps of a layer."""
        rng = np.random.default_rng(seed)
        size = (2.0**-BITS)[:, None, None, None, None] * np.exp(rng.normal(0, 0.5, (1, STEPS, LAYERS, 1, 1)))
        common = rng.normal(size=(len(BITS), 1, LAYERS, batch, WIDTH))
        own = rng.normal(size=(len(BITS), STEPS, LAYERS, batch, WIDTH))
        matrices = rng.normal(0, 1.2 / np.sqrt(WIDTH), (STEPS, WIDTH, WIDTH))
        cross = rng.normal(0, 2.0, STEPS)
        return cls(matrices, 4 * size * (common + own) / np.sqrt(2), cross, BUDGETS[seed % len(BUDGETS)])

    @property
    def start(self) -> Array:
        """No deviation, [batch, width]."""
        return np.zeros(self.errors.shape[3:])

    def step(self, state: Array, step: int, assignment: Assignment) -> Array:
        """The deviation after a step; any leading axes before [batch, width]."""
        first, second = (self.errors[assignment[layer], step, layer] for layer in range(LAYERS))
        return np.tanh(state) @ self.matrices[step].T + first + second + self.cross[step] * first * second

    @cached_property
    def to_the_end(self) -> Array:
        """∂x_T / ∂x_t at the full-precision path, [steps + 1, width, width]."""
        products = [np.eye(WIDTH)]
        for matrix in self.matrices[::-1]:
            products.append(products[-1] @ matrix)
        return np.stack(products[::-1])

    @cached_property
    def contributions(self) -> Array:
        """Single errors at the end, to first order and scaled as the real ones: [formats, steps, layers, rows]."""
        propagated = np.einsum("ftlbw,tvw->ftlbv", self.errors, self.to_the_end[1:])
        return propagated.reshape(*propagated.shape[:3], -1) / np.sqrt(len(self.start))

    @cached_property
    def _plans(self) -> dict[int, Plan]:
        return {}

    def plan(self, multipliers: int) -> Plan:
        """The real search's plan, with so many candidates for each step."""
        if multipliers not in self._plans:
            sensitivity = Sensitivity(SET, torch.from_numpy(self.contributions))
            self._plans[multipliers] = make_plan(sensitivity, BITS, self.budget, multipliers)
        return self._plans[multipliers]

    def error(self, state: Array) -> float:
        """Mean over the batch of |x|²."""
        return float(np.square(state).sum() / len(state))

    def best_error(self) -> float:
        """Brute force: all policies at once, the best of those within the budget."""
        states, bits = self.start[None], np.zeros(1)
        for step in range(STEPS):
            states = np.concatenate([self.step(states, step, row) for row in ALL_ASSIGNMENTS])
            bits = np.concatenate([bits + BITS[list(row)].sum() for row in ALL_ASSIGNMENTS])
        within = bits <= self.budget * STEPS * LAYERS + 1e-9
        return float((np.square(states).sum(axis=(1, 2)) / len(self.start))[within].min())


@dataclass(frozen=True)
class SmallProblem:
    """`Dynamics` as the beam sees them.

    Attributes:
        dynamics: the loop.
        count: candidates per step besides the previous assignment; None tries everything and estimates nothing.
    """

    dynamics: Dynamics
    count: int | None
    steps: int = STEPS

    def start(self) -> Array:
        """On the full-precision path."""
        return self.dynamics.start

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        """The plan's, or all."""
        if self.count is None:
            return ALL_ASSIGNMENTS
        return self.dynamics.plan(self.count).candidates(step, previous)

    @property
    def cheapest(self) -> Assignment:
        """The cheapest format everywhere."""
        return (0,) * LAYERS

    def bits(self, assignment: Assignment) -> float:
        """Sum over layers."""
        return float(BITS[list(assignment)].sum())

    def advance(self, step: int, moves: Sequence[tuple[Array, Assignment]]) -> list[Array]:
        """One step from each state."""
        return [self.dynamics.step(state, step, assignment) for state, assignment in moves]

    def predicted_errors(self, state: Array, step: int, assignments: Sequence[Assignment]) -> list[float]:
        """As the plan expects it."""
        assert self.count is not None
        plan, projected = self.dynamics.plan(self.count), self.projected(state, step)
        return [plan.predicted_error(projected, step, assignment) for assignment in assignments]

    def projected(self, state: Array, step: int) -> Array:
        """Project the state onto the end, to first order, scaled as contributions are."""
        return (state @ self.dynamics.to_the_end[step].T).ravel() / np.sqrt(len(state))

    def error(self, state: Array, step: int) -> float:
        """The error at the end; before it, as the plan expects it."""
        if step == STEPS:
            return self.dynamics.error(state)
        projected = self.projected(state, step)
        if self.count is None:
            return float(projected @ projected)
        return self.dynamics.plan(self.count).expected_error(projected, step)

    def fits(self, assignments: Sequence[Assignment]) -> bool:
        """Bits are all that is counted."""
        return True

    def remaining_error(self, step: int, bits: float) -> float:
        """The plan's, or only whether the budget can hold."""
        left = self.dynamics.budget * STEPS * LAYERS - bits
        if self.count is not None:
            plan = self.dynamics.plan(self.count)
            return plan.deviation_error(step, left, sum(self.bits(row) for row in plan.policies[0][step:]))
        return 0.0 if BITS[0] * LAYERS * (STEPS - step) <= left + 1e-9 else float("inf")


@dataclass(frozen=True)
class Selection:
    """One way to prune: what the settings call beam, candidates, slack and expansions; None for no limit."""

    beam: int | None
    candidates: int | None
    slack: float | None
    expansions: int | None = None


DEFAULTS = Selection(4, *(Settings.model_fields[name].default for name in ("candidates", "slack", "expansions")))
EXACT = Selection(None, None, None)
CHOICES = (
    DEFAULTS,
    EXACT,
    Selection(None, None, 0.0),
    Selection(None, None, 0.1),
    *(Selection(None, count, None) for count in (2, 4, 6)),
    *(Selection(beam, 4, slack) for beam in (2, 4, 8) for slack in (0.0, 0.1, 0.5, None)),
    *(Selection(beam, 6, 0.1) for beam in (4, 8)),
    *(Selection(DEFAULTS.beam, DEFAULTS.candidates, DEFAULTS.slack, most) for most in (1, 2, 4, 8)),
)

Problems = Sequence[tuple[Dynamics, float]]


def seeded_problems(count: int = PROBLEMS, batch: int = BATCH) -> Problems:
    """Problems with seeds 0 … and their least possible errors."""
    dynamics = [Dynamics.random(seed, batch) for seed in range(count)]
    return [(d, d.best_error()) for d in dynamics]


def regrets(choice: Selection, problems: Problems) -> Array:
    """error / least possible error - 1 of each problem."""
    result = []
    for dynamics, best in problems:
        pruning = Pruning(choice.beam, choice.slack, choice.expansions)
        paths = beam_search(SmallProblem(dynamics, choice.candidates), pruning)
        result.append(paths[0].error / best - 1)
    return np.array(result)


def figures(regret: Array) -> dict[str, float]:
    """Mean, median, 95th percentile and worst."""
    numbers = (regret.mean(), np.median(regret), np.percentile(regret, 95), regret.max())
    return {name: round(float(n), 4) for name, n in zip(("mean", "median", "p95", "worst"), numbers, strict=True)}


def main() -> None:
    """Measure every choice, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    output, rows = parser.parse_args().output, []
    names = ("batch", "beam", "candidates", "slack", "expansions", "mean", "median", "p95", "worst")
    print(" ".join(f"{name:>{max(len(name), 8)}}" for name in names))
    for batch in (BATCH, 4, 1):
        problems = seeded_problems(batch=batch)
        for choice in dict.fromkeys(CHOICES) if batch == BATCH else (DEFAULTS,):
            row = figures(regrets(choice, problems))
            rows.append({"batch": batch, **asdict(choice), **row})
            limits = ("all" if value is None else value for value in asdict(choice).values())
            cells = [str(batch), *map(str, limits), *(f"{value:.1%}" for value in row.values())]
            default = "  default" if choice == DEFAULTS else ""
            print(" ".join(f"{c:>{max(len(n), 8)}}" for c, n in zip(cells, names, strict=True)) + default, flush=True)
    output.write_text(json.dumps({"problems": PROBLEMS, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What the beam's pruning costs: its error against brute force on 200 seeded problems that are small enough for both.

    python benchmarks/search/regret.py

A problem has 3 steps, 2 layers and the formats of the set `paper` (3, 4 and 8 bits). Its state x is a deviation from a
full-precision path: x[t+1] = A_t tanh(x[t]) + e_t(assignment), and the policy's error is |x_T|². The error vector e_t is
the sum of both layers' errors and of their product, and a layer errs partly the same way at every step, so that errors
neither add nor stay apart. Candidates, the estimate of the rest and the guide (the error propagated to the end to first
order) are made as the real search makes them. Writes regret.json beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
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
        errors: of each format at each step and layer, [formats, steps, layers, width].
        cross: weight of the product of both layers' errors, [steps].
        budget: mean bits.
    """

    matrices: Array
    errors: Array
    cross: Array
    budget: float

    @classmethod
    def random(cls, seed: int) -> Dynamics:
        """Errors of 2^-bits in size, half of their variance common to all steps of a layer."""
        rng = np.random.default_rng(seed)
        size = (2.0**-BITS)[:, None, None, None] * np.exp(rng.normal(0, 0.5, (1, STEPS, LAYERS, 1)))
        common = rng.normal(size=(len(BITS), 1, LAYERS, WIDTH))
        own = rng.normal(size=(len(BITS), STEPS, LAYERS, WIDTH))
        matrices = rng.normal(0, 1.2 / np.sqrt(WIDTH), (STEPS, WIDTH, WIDTH))
        cross = rng.normal(0, 2.0, STEPS)
        return cls(matrices, 4 * size * (common + own) / np.sqrt(2), cross, BUDGETS[seed % len(BUDGETS)])

    def step(self, state: Array, step: int, assignment: Assignment) -> Array:
        """The deviation after a step, [width]."""
        first, second = (self.errors[assignment[layer], step, layer] for layer in range(LAYERS))
        return self.matrices[step] @ np.tanh(state) + first + second + self.cross[step] * first * second

    def to_the_end(self, step: int) -> Array:
        """∂x_T / ∂x_step at the full-precision path, [width, width]."""
        product = np.eye(WIDTH)
        for matrix in self.matrices[step:]:
            product = matrix @ product
        return product

    def plan(self, prices: int) -> Plan:
        """The real search's plan from single errors propagated to the end to first order."""
        propagated = [self.errors[:, step] @ self.to_the_end(step + 1).T for step in range(STEPS)]
        contributions = torch.from_numpy(np.stack(propagated, axis=1))
        return make_plan(Sensitivity(SET, contributions), BITS, self.budget, prices)

    def affords(self, rows: Sequence[Assignment]) -> bool:
        """Whether a policy keeps the budget."""
        return sum(BITS[i] for row in rows for i in row) <= self.budget * STEPS * LAYERS + 1e-9

    def policy_error(self, rows: Sequence[Assignment]) -> float:
        """|x_T|²."""
        state = np.zeros(WIDTH)
        for step, row in enumerate(rows):
            state = self.step(state, step, row)
        return float(state @ state)

    def best_error(self) -> float:
        """Brute force over all policies within the budget."""
        policies = itertools.product(ALL_ASSIGNMENTS, repeat=STEPS)
        return min(self.policy_error(rows) for rows in policies if self.affords(rows))


@dataclass(frozen=True)
class SmallProblem:
    """`Dynamics` as the beam sees them.

    Attributes:
        dynamics: the loop.
        plan: source of the candidates and of the estimate of the rest; None tries everything and estimates nothing.
    """

    dynamics: Dynamics
    plan: Plan | None
    steps: int = STEPS

    def start(self) -> Array:
        """On the full-precision path."""
        return np.zeros(WIDTH)

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        """The plan's, or all."""
        return ALL_ASSIGNMENTS if self.plan is None else self.plan.candidates(step, previous)

    def bits(self, assignment: Assignment) -> float:
        """Sum over layers."""
        return float(BITS[list(assignment)].sum())

    def advance(self, state: Array, step: int, assignment: Assignment) -> Array:
        """One step."""
        return self.dynamics.step(state, step, assignment)

    def error(self, state: Array, step: int) -> float:
        """Squared deviation at the end: to first order and, where there is a plan, with what the plan adds to it."""
        if step == STEPS:
            return float(state @ state)
        projected = self.dynamics.to_the_end(step) @ state
        return float(projected @ projected) if self.plan is None else self.plan.expected_error(projected, step)

    def remaining_error(self, step: int, bits: float) -> float:
        """The plan's, or only whether the budget can hold."""
        left = self.dynamics.budget * STEPS * LAYERS - bits
        if self.plan is not None:
            own = sum(self.bits(row) for row in self.plan.policies[0][step:])
            return self.plan.deviation_error(step, left, own)
        return 0.0 if BITS[0] * LAYERS * (STEPS - step) <= left + 1e-9 else float("inf")


@dataclass(frozen=True)
class Choice:
    """One way to prune: what `--beam` and the settings call beam, candidates and slack; None for no limit."""

    beam: int | None
    candidates: int | None
    slack: float | None


DEFAULTS = Choice(*(Settings.model_fields[name].default for name in ("beam", "candidates", "slack")))
CHOICES = (
    Choice(None, None, None),
    Choice(None, None, 0.0),
    Choice(None, DEFAULTS.candidates, None),
    Choice(4, 4, 0.1),
    Choice(4, 4, 0.5),
    Choice(4, 4, None),
    Choice(8, 4, 0.1),
    Choice(8, 4, None),
    Choice(8, 8, 0.1),
    Choice(8, 8, None),
    Choice(16, 8, None),
    DEFAULTS,
)


def regrets(choice: Choice, problems: Sequence[tuple[Dynamics, float]]) -> Array:
    """error / least possible error - 1 of each problem.

    Args:
        choice: how to prune.
        problems: each with its least possible error.
    """
    result = []
    for dynamics, best in problems:
        plan = None if choice.candidates is None else dynamics.plan(choice.candidates)
        paths = beam_search(SmallProblem(dynamics, plan), Pruning(choice.beam, choice.slack))
        result.append(paths[0].error / best - 1)
    return np.array(result)


def seeded_problems(count: int = PROBLEMS) -> list[tuple[Dynamics, float]]:
    """Problems with seeds 0 … and their least possible errors."""
    dynamics = [Dynamics.random(seed) for seed in range(count)]
    return [(d, d.best_error()) for d in dynamics]


def figures(regret: Array) -> dict[str, float]:
    """Mean, median, 95th percentile and worst."""
    numbers = (regret.mean(), np.median(regret), np.percentile(regret, 95), regret.max())
    return {name: round(float(n), 4) for name, n in zip(("mean", "median", "p95", "worst"), numbers, strict=True)}


def main() -> None:
    """Measure every choice, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    output = parser.parse_args().output
    problems, rows = seeded_problems(), []
    print(f"{'beam':>6} {'candidates':>10} {'slack':>6} {'mean':>8} {'median':>8} {'p95':>8} {'worst':>8}")
    for choice in dict.fromkeys(CHOICES):
        row = figures(regrets(choice, problems))
        rows.append({**vars(choice), "default": choice == DEFAULTS, **row})
        names = [str(value if value is not None else "all") for value in vars(choice).values()]
        percent = " ".join(f"{value:>8.1%}" for value in row.values())
        print(f"{names[0]:>6} {names[1]:>10} {names[2]:>6} {percent}{'  default' if choice == DEFAULTS else ''}")
    output.write_text(json.dumps({"problems": PROBLEMS, "choices": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The search's problem on a real model: calibration latents carried along every path."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, latent_mse
from adatsq_trt.formats import Format
from adatsq_trt.search.budgets import Budgets
from adatsq_trt.search.candidates import Assignment
from adatsq_trt.search.plan import Plan
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.solver import State


def projected_error(state: State[Tensor], reference: State[Tensor], adjoint: State[Tensor]) -> np.ndarray:
    """Project an error at one step onto the final picture: aᵀ δ, scaled so that squares sum to a latent MSE.

    Args:
        state: the path's, of float32 [samples, *latent_shape].
        reference: the full-precision one at the same step.
        adjoint: at that step, of float32 [projections, samples, *latent_shape]; none for clean latents at the end.

    Returns:
        float64 [projections * samples], in the order of the contributions' rows.
    """
    carried = zip(adjoint.clean, state.clean, reference.clean, strict=False)
    projected = sum(
        (
            (gradient.double() * (own - other).double()).flatten(2).sum(dim=2).flatten()
            for gradient, own, other in carried
        ),
        start=(adjoint.latent.double() * (state.latent - reference.latent).double()).flatten(2).sum(dim=2).flatten(),
    )
    return (projected / math.sqrt(len(projected) * state.latent[0].numel())).numpy()


@dataclass
class DenoisingProblem:
    """Beam search over a denoising loop; a state is the calibration batch's own.

    Attributes:
        samples: the calibration batch.
        simulation: of the fake-quantized model; assignments are indices into its formats, cheapest first.
        reference: states of the full-precision trajectory, steps + 1.
        adjoints: of these.
        plan: candidates and the estimate of the rest.
        budget: mean bits per (step, layer).
        calls: denoiser calls so far.
    """

    samples: Samples
    simulation: Simulation
    reference: Sequence[State[Tensor]]
    adjoints: Sequence[State[Tensor]]
    plan: Plan
    budget: float
    calls: int = field(default=0)

    @property
    def steps(self) -> int:
        """Number of columns."""
        return self.samples.schedule.steps

    def start(self) -> State[Tensor]:
        """The first latents."""
        return self.reference[0]

    def candidates(self, step: int, previous: Assignment | None) -> Sequence[Assignment]:
        """The plan's rows at several multipliers, and the previous assignment."""
        return self.plan.candidates(step, previous)

    @property
    def cheapest(self) -> Assignment:
        """The cheapest format everywhere."""
        return (0,) * len(self.simulation.model.layers)

    def bits(self, assignment: Assignment) -> float:
        """Sum over layers of nominal bits."""
        return sum(self.simulation.formats[i].bits for i in assignment)

    def advance(self, step: int, moves: Sequence[tuple[State[Tensor], Assignment]]) -> Iterable[State[Tensor]]:
        """One denoising step from each of these states with these formats."""
        self.calls += len(moves)
        return self.simulation.advance(self.samples, step, moves)

    def error(self, state: State[Tensor], step: int) -> float:
        """Error of the final picture if the rest follows the plan; after the last step the error itself."""
        if step == self.steps:
            return latent_mse(state.latent, self.reference[step].latent)
        projected = projected_error(state, self.reference[step], self.adjoints[step])
        return self.plan.expected_error(projected, step)

    def predicted_errors(self, state: State[Tensor], step: int, assignments: Sequence[Assignment]) -> list[float]:
        """As the plan expects it of the path so far and of each assignment's contributions."""
        projected = projected_error(state, self.reference[step], self.adjoints[step])
        return [self.plan.predicted_error(projected, step, assignment) for assignment in assignments]

    def fits(self, assignments: Sequence[Assignment]) -> bool:
        """Mean bits add up."""
        return True

    def remaining_error(self, step: int, bits: float) -> float:
        """Estimate what the rest adds or saves with other bits than planned; infinite where the budget is too small."""
        left = self.budget * self.steps * len(self.simulation.model.layers) - bits
        own = sum(self.bits(row) for row in self.plan.policies[0][step:])
        return self.plan.deviation_error(step, left, own)


@dataclass
class ConstrainedProblem(DenoisingProblem):
    """The same problem under several budgets: a path's cost is counted at their multipliers.

    Attributes:
        budgets: all of them.
        cost: of one step at the multipliers: [formats, layers], infinite where a layer does not store a format.
    """

    budgets: Budgets = field(kw_only=True)
    cost: np.ndarray = field(kw_only=True)

    @property
    def cheapest(self) -> Assignment:
        """The least cost of every layer; a path that no candidate fits goes on with it."""
        return tuple(int(i) for i in np.argmin(self.cost, axis=0))

    def bits(self, assignment: Assignment) -> float:
        """Sum over layers of what their formats cost."""
        return float(self.cost[list(assignment), np.arange(len(assignment))].sum())

    def fits(self, assignments: Sequence[Assignment]) -> bool:
        """Whether the plan's own rest or the cheapest keeps every budget."""
        return self.budgets.fits(assignments, [self.plan.policies[0], [self.cheapest] * self.steps])

    def remaining_error(self, step: int, bits: float) -> float:
        """As the plan expects it for what is left of the cost of the plan's own policy."""
        total, own = (sum(map(self.bits, self.plan.policies[0][first:])) for first in (0, step))
        deviation = self.plan.deviation_error(step, max(total - bits, float(self.plan.tail_bits[step, 0])), own)
        return deviation if math.isfinite(bits) else math.inf


def row_errors(latents: Tensor, reference: Tensor) -> Tensor:
    """Latent MSE of every row, float64 [rows].

    Args:
        latents: float32 [rows, ...]: a row is a sample, or a step of all samples.
        reference: the same in full precision.
    """
    return (latents.double() - reference.double()).square().flatten(1).mean(dim=1)


def format_bits(formats: Sequence[Format]) -> np.ndarray:
    """Nominal bits of each format, float64."""
    return np.array([f.bits for f in formats], dtype=np.float64)

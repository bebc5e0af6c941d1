"""Calibration in units of work that do not depend on each other: some samples at one step, or all samples at one step.

The size of a part of the batch is fixed, whoever computes it: other sizes round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from adatsq_trt.calibration.fisher import LayerGradients, backward_step, squared_weight_gradient
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.execution import Executor, Shared
from adatsq_trt.solver import State

# Samples of a unit.
SAMPLES_PER_BACKWARD = 16

ExtraT = TypeVar("ExtraT")


@dataclass(frozen=True)
class Place:
    """Some samples at one step.

    Attributes:
        step: index in the loop.
        samples: slice of the batch.
        latent: theirs, float32 [some samples, *latent_shape]; memory of its own, since all of a view's would be sent.
        clean: what their state carries beside it, where the step is taken.
    """

    step: int
    samples: slice
    latent: Tensor
    clean: tuple[Tensor, ...] = ()


def parts(count: int) -> list[slice]:
    """A batch in parts."""
    return [slice(start, min(start + SAMPLES_PER_BACKWARD, count)) for start in range(0, count, SAMPLES_PER_BACKWARD)]


def measured_trajectory(
    executor: Executor, batch: Shared[Samples], noise: Tensor, steps: int
) -> Iterator[State[Tensor]]:
    """States of the batch after each step in full precision, of float32 [samples, *latent_shape].

    Args:
        executor: who computes.
        batch: the samples.
        noise: their first latents.
        steps: of the loop.
    """
    state = State(noise)
    for step in range(steps):
        own = [(part, state[part].each(torch.clone)) for part in parts(len(noise))]
        places = [Place(step, part, before.latent, before.clean) for part, before in own]
        state = State.joined(list(executor.map(_full_precision_step, batch, places)), torch.cat)
        yield state


def _full_precision_step(batch: Samples, place: Place) -> State[Tensor]:
    return batch.part(place.samples).step(State(place.latent, place.clean), place.step)


# ------------------------------------------------------------------------------------------------- backwards


@dataclass(frozen=True)
class Measured(Generic[ExtraT]):
    """Data that all units of a backward sweep share.

    Attributes:
        samples: the batch.
        extra: data that the measurement needs beside the samples.
        by_block: whether one block at a time is in memory (`backward_step`).
    """

    samples: Samples
    extra: ExtraT
    by_block: bool = False


@dataclass(frozen=True)
class Swept:
    """A step of the sweep.

    Attributes:
        step: index in the loop.
        adjoint: of the state before the step, all samples, float32 [projections, samples, *latent_shape].
        measured: measurements of every layer, by part of the batch: [layers, ...]; 0 of one that does not run.
    """

    step: int
    adjoint: State[Tensor]
    measured: list[Tensor]


# Module path → tensor, for the layers that it is shown.
Measure = Callable[[Measured[ExtraT], LayerGradients], dict[str, Tensor]]


def backward_sweep(
    executor: Executor,
    common: Shared[Measured[ExtraT]],
    measure: Measure[ExtraT],
    latents: Tensor,
    adjoint: State[Tensor],
    last: int,
) -> Iterator[Swept]:
    """The adjoint recursion from step `last` to the first, with a measurement at each.

    Args:
        executor: who computes.
        common: of all units.
        measure: called, where the unit is computed, with inputs and gradients of some samples.
        latents: full-precision trajectory, float32 [steps + 1, samples, *latent_shape].
        adjoint: of the state after step `last`, float32 [projections, samples, *latent_shape]; u itself after the
            last step of all.
        last: step to begin with.
    """
    for step in range(last, -1, -1):
        units = [
            (measure, Place(step, part, latents[step, part].clone()), _of_part(adjoint, part))
            for part in parts(latents.shape[1])
        ]
        results = list(executor.map(_measure_backwards, common, units))
        adjoint = State.joined([own for own, _ in results], partial(torch.cat, dim=1))
        yield Swept(step, adjoint, [value for _, value in results])


def _of_part(adjoint: State[Tensor], part: slice) -> State[Tensor]:
    return adjoint[:, part].each(torch.clone)


def _measure_backwards(
    common: Measured[ExtraT], unit: tuple[Measure[ExtraT], Place, State[Tensor]]
) -> tuple[State[Tensor], Tensor]:
    (measure, place, adjoint), found = unit, dict[str, Tensor]()

    def visit(layers: LayerGradients) -> None:
        found.update(measure(common, layers))

    samples = common.samples.part(place.samples)
    before = backward_step(samples, place.latent, adjoint, place.step, visit, common.by_block)
    nothing = torch.zeros_like(next(iter(found.values())))  # of a layer that does not run at this step
    active = samples.adapter.active(samples.schedule)[place.step]
    layers = zip(samples.adapter.quantizable_layers(), active, strict=True)
    return before, torch.stack([found[name] if runs else nothing for name, runs in layers])


def squared_gradients(_common: Measured[None], layers: LayerGradients) -> dict[str, Tensor]:
    """||dL/dW||² of every projection and sample: float32 [projections, samples]."""
    return {name: squared_weight_gradient(x, layers.gradients[name]) for name, x in layers.inputs.items()}

"""The fake-quantized model at work: single steps, whole trajectories and their errors as units of work.

Workers are given the model once. Every unit says the formats of each step that it takes, so none depends on another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.finite import watched
from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL, Samples, trajectory
from adatsq_trt.errors import UnsupportedFormatError
from adatsq_trt.execution import Executor, InProcess
from adatsq_trt.formats import Format
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.schedule import Schedule
from adatsq_trt.search.candidates import Assignment
from adatsq_trt.solver import State


@dataclass(frozen=True)
class _Loop:
    """Data that all units of work share.

    Attributes:
        model: installed.
        formats: those that assignments index.
        schedule: of the denoising loop.
        guidance: its scale.
        guidance_2: as of `Samples`.
    """

    model: SimulatedModel
    formats: tuple[Format, ...]
    schedule: Schedule
    guidance: float
    guidance_2: float | None

    def samples(self, batch: _Batch) -> Samples:
        """The batch on this model."""
        own = (self.model.adapter, self.schedule, self.guidance)
        return Samples(*own, batch.prompts, batch.seeds, self.guidance_2)

    def assign(self, assignment: Assignment | None, step: int) -> None:
        """Choose the formats of a step; None for full precision."""
        chosen = None if assignment is None else as_formats(self.model.layers, assignment, self.formats)
        self.model.assign(chosen, step)


@dataclass(frozen=True)
class _Batch:
    """Samples without their model."""

    prompts: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Move:
    """One step of a batch from each of several states, of float32 [states, samples, *latent_shape]."""

    batch: _Batch
    step: int
    states: State[Tensor]
    assignment: Assignment


@dataclass(frozen=True)
class _Whole:
    """All steps of a batch under a policy; in full precision without one."""

    batch: _Batch
    rows: tuple[Assignment, ...] | None


class Simulation:
    """A fake-quantized model and those who run it.

    Attributes:
        model: installed.
        formats: those that assignments index.
    """

    def __init__(
        self,
        model: SimulatedModel,
        formats: Sequence[Format],
        schedule: Schedule,
        guidance: float,
        executor: Executor | None = None,
        together: int = 1,
        guidance_2: float | None = None,
    ) -> None:
        """Give the model to the workers.

        Args:
            model: installed.
            formats: cheapest first.
            schedule: of the denoising loop.
            guidance: its scale.
            executor: who computes; this process if nobody else.
            together: most latents of a beam that are one call of the model where they have an assignment in common,
                which saves a GPU from making its weights for each. Other numbers round differently.
            guidance_2: as of `Samples`.
        """
        self.model, self.formats, self._together = model, tuple(formats), together
        self._executor = InProcess() if executor is None else executor
        self._own = _Loop(model, self.formats, schedule, guidance, guidance_2)
        self._loop = self._executor.share(self._own)

    def advance(
        self, samples: Samples, step: int, moves: Sequence[tuple[State[Tensor], Assignment]]
    ) -> Iterator[State[Tensor]]:
        """States after one step, for each of several states and assignments, in their order.

        Args:
            samples: the batch.
            step: index in the loop.
            moves: states before it, of float32 [samples, *latent_shape], and format indices.
        """
        batch = _Batch(samples.prompts, samples.seeds)
        groups = list(self._groups([assignment for _, assignment in moves]))
        joined = [State.joined([moves[i][0] for i in group], torch.stack) for group in groups]
        units = [_Move(batch, step, own, moves[group[0]][1]) for group, own in zip(groups, joined, strict=True)]
        after = dict[int, State[Tensor]]()
        for group, states in zip(groups, self._executor.map(_advance, self._loop, units), strict=True):
            own = states.each(torch.clone)
            after |= {i: own[place] for place, i in enumerate(group)}
        return iter([after[i] for i in range(len(moves))])

    def _groups(self, assignments: Sequence[Assignment]) -> Iterator[list[int]]:
        """Indices of equal assignments, at most `together` in a group."""
        indices = dict[Assignment, list[int]]()
        for i, assignment in enumerate(assignments):
            indices.setdefault(assignment, []).append(i)
        for alike in indices.values():
            yield from (alike[i : i + self._together] for i in range(0, len(alike), self._together))

    def final_latents(self, samples: Samples, policies: Sequence[Sequence[Assignment] | None]) -> Iterator[Tensor]:
        """Pictures of a large batch under each policy, float32 [samples, *latent_shape]; in full precision without one.

        A unit is a part of the batch that stays in the processor's cache.
        """
        parts = [
            samples.part(slice(start, start + SAMPLES_PER_CALL))
            for start in range(0, len(samples.seeds), SAMPLES_PER_CALL)
        ]
        units = [
            _Whole(_Batch(part.prompts, part.seeds), None if rows is None else tuple(rows))
            for rows in policies
            for part in parts
        ]
        latents = self._executor.map(_final_latents, self._loop, units)
        for _ in policies:
            yield torch.cat([next(latents) for _ in parts])

    def overflow(self, sample: Samples, rows: Sequence[Assignment]) -> tuple[int, str, str] | None:
        """The step, layer and format in which the numbers of a sample first stop being finite; in this process.

        Returns:
            None where all layers' outputs are finite: what grew is between them, or the latents.
        """
        layers, before = self.model.layers, list[int]()
        transformer = self.model.adapter.transformer
        with watched((name, transformer.get_submodule(name)) for name in layers) as found:

            def begin(step: int) -> None:
                before.append(len(found))
                self._own.assign(rows[step], step)

            trajectory(self._own.samples(_Batch(sample.prompts, sample.seeds)), begin)
        if not found:
            return None
        step, layer = before.count(0) - 1, found[0]
        return step, layer, self.formats[rows[step][layers.index(layer)]].name

    def trajectories(self, samples: Samples, policies: Sequence[Sequence[Assignment]]) -> Iterator[Tensor]:
        """All latents of a small batch under each policy, float32 [steps + 1, samples, *latent_shape]."""
        batch = _Batch(samples.prompts, samples.seeds)
        return self._executor.map(_trajectory, self._loop, [_Whole(batch, tuple(rows)) for rows in policies])


def require_finite(simulation: Simulation, samples: Samples, rows: Sequence[Assignment], errors: Tensor) -> None:
    """Refuse a policy under which a sample's numbers stop being finite: no figure of it would say anything.

    Args:
        simulation: of the model.
        samples: those that were drawn under the policy.
        rows: the policy.
        errors: of the samples.

    Raises:
        UnsupportedFormatError: names the step, the layer whose output is the first that is not finite, and its format;
            the policy's formats where there is no such layer.
    """
    if bool(errors.isfinite().all()):
        return
    sample = int((~errors.isfinite()).nonzero()[0])
    first = simulation.overflow(samples.part(slice(sample, sample + 1)), rows)
    if first is None:
        used = ", ".join(sorted({simulation.formats[index].name for row in rows for index in row}))
        raise UnsupportedFormatError(
            f"a policy of {used} gives latents with NaN, infinity or errors too large for a number, though the outputs "
            "of all its layers are finite; leave the cheapest format out of --formats"
        )
    step, layer, fmt = first
    raise UnsupportedFormatError(
        f"step {step}: layer '{layer}' in format '{fmt}' gives NaN or infinite numbers, which full precision does not; "
        "leave the format out of --formats"
    )


def as_formats(layers: Sequence[str], assignment: Assignment, formats: Sequence[Format]) -> dict[str, Format]:
    """Format indices → module path → format."""
    return {layer: formats[index] for layer, index in zip(layers, assignment, strict=True)}


def _advance(loop: _Loop, move: _Move) -> State[Tensor]:
    loop.assign(move.assignment, move.step)
    like, batch = move.states.latent, move.batch
    samples = loop.samples(_Batch(batch.prompts * len(like), batch.seeds * len(like)))
    return samples.step(move.states.each(lambda value: value.flatten(0, 1)), move.step).each(
        lambda value: value.view_as(like)
    )


def _trajectory(loop: _Loop, whole: _Whole) -> Tensor:
    rows = whole.rows
    return trajectory(loop.samples(whole.batch), lambda step: loop.assign(None if rows is None else rows[step], step))


def _final_latents(loop: _Loop, whole: _Whole) -> Tensor:
    return _trajectory(loop, whole)[-1].clone()

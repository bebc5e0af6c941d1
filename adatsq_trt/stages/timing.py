"""Seconds that units of work take on this machine: the units themselves, run for a moment before anything else is.

Weights are the model's own, or zeros in their place where a checkpoint is not loaded yet; rounded ones are rounded to
nearest and have no transform. Of models that are too large for that, the arithmetic of a call is counted and a product
of matrices is timed; other units are then told from what they compute beside a call.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from adatsq_trt.calibration.clips import PROJECTIONS, ClipSearch, clip_errors, clipped_grids
from adatsq_trt.calibration.fisher import backward_step, projections
from adatsq_trt.calibration.hessian import layer_moments
from adatsq_trt.calibration.shared_gradients import GradientUnit, keeping
from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL
from adatsq_trt.calibration.units import (
    SAMPLES_PER_BACKWARD,
    ExtraT,
    Measure,
    Measured,
    backward_sweep,
    measured_trajectory,
    squared_gradients,
)
from adatsq_trt.execution import Executor
from adatsq_trt.formats import Format
from adatsq_trt.models.flow import count_operations
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.stored import count_weights
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest
from adatsq_trt.search.sensitivity import Candidates, measure_contributions
from adatsq_trt.search.simulation import as_formats
from adatsq_trt.solver import State
from adatsq_trt.stages import calibrate, export, gradients, quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.work import Work
from adatsq_trt.transforms import IDENTITY

# That a kind of unit is run for; one that would take longer for a single sample is not run.
_LONGEST_SECONDS = 0.6
# That all units of a kind may take without being timed.
_WORTH_SECONDS = 10
# Larger models are not run: bytes of the weights with those of all formats, operations of a call of one sample.
_MOST_BYTES, _MOST_OPERATIONS = 1 << 30, 2e10
# Sides of the layer that is solved and of the products that tell how fast this machine is; rows of the latter.
_MOST_SIDE, _ROWS = 1024, 512
# Of the exporter and the compiler for each quantizable layer, as they were on two processors of a server (2026-12-01).
_SECONDS_PER_LAYER: Mapping[str, float] = {"trace": 0.1, "graph": 0.05, "plan": 0.07}


def unit_seconds(context: Context, work: Work) -> dict[str, float]:
    """Time units of work on this machine's processors.

    Args:
        context: of a run; of the model nothing but its outline is needed.
        work: to be done, which decides what is worth a timing of its own.
    """
    found: dict[str, float] = {unit: each * len(context.layers) for unit, each in _SECONDS_PER_LAYER.items()}
    if "layer" in work:
        found["layer"] = _layer_seconds(context)
    others = [unit for unit in work if unit not in found]
    if not others:
        return found
    timed = _small_enough(context)
    call = _arithmetic_seconds(context) if timed is None else timed.seconds("call")
    found |= {unit: call * count for unit, count in _calls_of_a_unit(context).items()}
    for unit in others:
        longest = _WORTH_SECONDS / work[unit]
        if timed is not None and unit != "call" and longest < found[unit] < _LONGEST_SECONDS:
            found[unit] = timed.seconds(unit)
    return found


def _calls_of_a_unit(context: Context) -> dict[str, float]:
    """Tell units in calls of one sample by their matrix products: forwards, backwards, and what is measured."""
    return {
        "call": 1,
        "rounded": 1.5,
        "pair": export.CHECK_SAMPLES,
        "moments": 2,
        "fisher": 3,
        "gradients": 4,
        "clips": 1 + 2 * PROJECTIONS,
        "sensitivity": 1 + context.settings.projections + len(context.formats),
    }


def _small_enough(context: Context) -> TimedUnits | None:
    """The units of a run, where its model is small enough to be run for them."""
    held = 4 * count_weights(context.adapter.transformer) * (1 + len(context.formats))
    operations = count_operations(context.adapter, context.schedule, context.settings.guidance)
    if held > min(_MOST_BYTES, context.room_bytes) or operations > _MOST_OPERATIONS:
        return None
    if context.pipeline is None:
        return TimedUnits(context)
    model = context.pipeline.stand_in()
    model.adapter.excluded = context.adapter.excluded
    return TimedUnits(replace(context, model=model))


@dataclass(frozen=True)
class TimedUnits:
    """Units of a run at its first step, computed as its stages compute them.

    Attributes:
        context: with a model that has weights.
    """

    context: Context

    def seconds(self, unit: str) -> float:
        """Time a unit."""
        own: dict[str, Callable[[], float]] = {
            "call": self._call,
            "rounded": self._rounded,
            "pair": self._pair,
            "moments": self._moments,
            "fisher": self._fisher,
            "gradients": self._gradients,
            "clips": self._clips,
            "sensitivity": self._sensitivity,
        }
        return own[unit]()

    def _call(self) -> float:
        executor, samples = self.context.executor, self.context.calibration
        batch, noise = executor.share(samples), samples.noise()
        return self._each(lambda count: list(measured_trajectory(executor, batch, noise[:count], 1)))

    def _moments(self) -> float:
        context, blocks = self.context, self.context.adapter.layers_by_block()
        held = calibrate.hessian_passes(context, tuple(blocks))[0]
        weights = dict.fromkeys(layer for block in held for layer in blocks[block])
        states = context.calibration.noise().expand(2, -1, *context.adapter.latent_shape)

        def run(count: int) -> None:
            batch = context.executor.share(context.calibration.part(slice(0, count)))
            layer_moments(context.executor, batch, states[:, :count], weights, lambda: None)

        return self._each(run)

    def _fisher(self) -> float:
        return self._swept(self.context.executor, squared_gradients, None, 1)

    def _clips(self) -> float:
        formats, steps = self.context.formats, self.context.settings.steps
        clipped = ClipSearch(clipped_grids(formats), torch.ones(steps, len(self.context.layers)), {})
        return self._swept(self.context.executor, clip_errors, clipped, PROJECTIONS)

    def _sensitivity(self) -> float:
        context, candidates = self.context, Candidates(self.context.formats, self._store)
        with search.computing(context) as executor:
            return self._swept(executor, measure_contributions, candidates, context.settings.projections)

    def _swept(self, executor: Executor, measure: Measure[ExtraT], extra: ExtraT, count: int) -> float:
        """Time a step of a backward sweep with so many projections."""
        samples, by_block = self.context.calibration, self.context.by_block(count)
        common, noise = executor.share(Measured(samples, extra, by_block)), samples.noise()
        start = projections(len(noise), self.context.adapter.latent_shape, count, seed=0)

        def run(some: int) -> None:
            list(backward_sweep(executor, common, measure, noise[None, :some], State(start[:, :some]), last=0))

        return self._each(run)

    def _gradients(self) -> float:
        context, blocks = self.context, self.context.adapter.layers_by_block()
        one = gradients.gradient_passes(context, tuple(blocks))[0]
        layers = tuple(layer for block in one.blocks for layer in blocks[block])
        samples, coherent = context.calibration, context.settings.hessian == gradients.COHERENT
        noise, shape = samples.noise(), context.adapter.latent_shape

        def run(count: int) -> None:
            start = projections(count, shape, gradients.PROJECTIONS, seed=0)
            unit = GradientUnit(slice(0, count), noise[None, :count], start, layers, one.at_once)
            visit = keeping(coherent, unit, 0, {})
            backward_step(samples.part(unit.samples), noise[:count], State(start), 0, visit, one.by_block)

        return _seconds_each(run, min(SAMPLES_PER_BACKWARD, len(noise)))

    def _rounded(self) -> float:
        context, samples = self.context, self.context.selection
        together, noise, assignment = torch.get_num_threads(), samples.noise(), self._assignment
        with search.computing(context) as executor, search.simulation_of(context, self._store, executor) as simulation:

            def run(count: int) -> None:
                moves = [(State(noise[:count]), assignment)] * together
                list(simulation.advance(samples.part(slice(0, count)), 0, moves))

            return _seconds_each(run, min(SAMPLES_PER_CALL, len(noise))) / together

    def _pair(self) -> float:
        context = self.context
        samples = context.calibration.part(slice(0, export.CHECK_SAMPLES))
        noise, assigned = samples.noise(), as_formats(context.layers, self._assignment, context.formats)
        with context.simulated(self._store).installed() as model:
            model.assign(assigned, 0)
            return _seconds_each(lambda _count: samples.velocity(noise, 0), 1)

    @property
    def _assignment(self) -> tuple[int, ...]:
        """The formats in turns."""
        return tuple(index % len(self.context.formats) for index in range(len(self.context.layers)))

    @cached_property
    def _store(self) -> CandidateWeights:
        """Weights as they come: one for all layers of a shape."""
        context, made = self.context, dict[object, QuantizedWeight]()

        def rounded(weight: torch.Tensor, fmt: Format) -> QuantizedWeight:
            key = weight.shape, fmt.weight
            if key not in made:
                made[key] = quantize_nearest(weight.detach(), fmt)
            return made[key]

        linears = context.adapter.quantizable_layers()
        scale = torch.ones(context.settings.steps, len(linears))
        return CandidateWeights(
            {
                fmt.name: {name: rounded(linear.weight, fmt) for name, linear in linears.items()}
                for fmt in context.formats
            },
            {fmt.name: scale for fmt in context.formats if fmt.scaled_activation},
        )

    def _each(self, run: Callable[[int], object]) -> float:
        """Time a sample of the calibration batch, of which as many are computed at once as there are processors."""
        most = SAMPLES_PER_BACKWARD * torch.get_num_threads()
        return _seconds_each(run, min(most, self.context.settings.calibration_samples))


def _seconds_each(run: Callable[[int], object], most: int) -> float:
    """Seconds for one of as many as take a moment together, of two tries: something may be compiled in the first."""
    run(1)
    count = 1
    while True:
        seconds = min(_seconds(run, count), _seconds(run, count))
        if count == most or 2 * seconds > _LONGEST_SECONDS:
            return seconds / count
        count = min(2 * count, most)


def _seconds(run: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def _layer_seconds(context: Context) -> float:
    """Mean seconds for which a layer is solved: the commonest is, or a part of it, and others are told from theirs."""
    shapes = Counter((x.in_features, x.out_features) for x in context.adapter.quantizable_layers().values())
    (commonest, _), *_ = shapes.most_common(1)
    width, rows = (min(side, _MOST_SIDE) for side in commonest)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * width, width, generator=generator)
    problem = quantize.Problem(torch.randn(rows, width, generator=generator), inputs.mT @ inputs, IDENTITY)
    solver = quantize.Solver(context.formats, context.settings.damping)
    seconds = _seconds_each(lambda _count: quantize.solve_layer(solver, problem), 1)
    mean = sum(count * _solved(*shape) for shape, count in shapes.items()) / shapes.total()
    return seconds * mean / _solved(width, rows)


def _solved(width: int, rows: int) -> float:
    """Tell how long a layer takes: every column is rounded, corrected by its neighbours and by all before it."""
    return width * rows * (width + _MOST_SIDE)


def _arithmetic_seconds(context: Context) -> float:
    """Seconds for the arithmetic of a call of one sample."""
    shapes = Counter((x.in_features, x.out_features) for x in context.adapter.quantizable_layers().values())
    (commonest, _), *_ = shapes.most_common(1)
    width, rows = (min(side, 4 * _MOST_SIDE) for side in commonest)
    x, weight = torch.ones(_ROWS, width), torch.ones(width, rows)
    seconds = _seconds_each(lambda _count: x @ weight, 1)
    operations = count_operations(context.adapter, context.schedule, context.settings.guidance)
    return seconds * operations / (2 * _ROWS * width * rows)

"""Times of a bundle's steps on this machine: as the policy has them, in each assignment, and in full precision.

Beside plans also those of plans in 16 bits and in one format everywhere, which are compiled for the comparison.

Calls of all cases are interleaved, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.cuda_device import gpu_name
from adatsq_trt.engines.backends.device_steps import DeviceSteps
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.rtx_steps import ComparisonSteps, RtxSteps
from adatsq_trt.engines.backends.selection import BackendChoice, BackendName
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend
from adatsq_trt.engines.backends.tensorrt_steps import TensorRTSteps
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.comparison_plans import FULL_PRECISION, SIXTEEN_BITS, build_comparison_plans
from adatsq_trt.engines.generation import DenoisingLoop
from adatsq_trt.engines.processor import INTEGER_INSTRUCTIONS, processor
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import AdatsqError

log = logging.getLogger(__name__)
WARM_UP_ROUNDS = 2
# (bundle, what runs it, rows of a call) → a bundle whose steps have one format each; None where there is none.
MakeUniform: TypeAlias = Callable[[BundleFiles, BackendChoice, int], BundleFiles | None]

_LIBRARIES = {
    "rtx": RtxBackend,
    "tensorrt": TensorRTBackend,
    "cuda": OnnxRuntimeBackend,
    "onnxruntime": OnnxRuntimeBackend,
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Record):
    """Machine that the figures were measured on.

    Attributes:
        processor: its name.
        instructions: those of its instruction sets that integer and float products use.
        cores: logical ones that this process may use.
        gpu: name of the GPU that plans ran on; None where none did.
        versions: library → version.
    """

    processor: str
    instructions: tuple[str, ...]
    cores: int
    gpu: str | None
    versions: dict[str, str]


class Timing(_Record):
    """One case: a step of a bundle with certain formats.

    Attributes:
        bundle: path as it was given.
        layout: of the bundle.
        backend: name of the backend that ran it.
        case: "policy" (all steps in order), "assignment 3", "uniform fp8", "16 bits" or "full precision".
        formats: format → (step, layer) pairs or layers that have it; empty in full precision.
        samples: in one call.
        rows: of one call: samples times guidance branches.
        calls: calls that were timed, after the warm-up.
        steps_per_second: of the median.
        median_ms, least_ms, p10_ms, p90_ms: of one step.
        picture_seconds: of as many steps as the policy has.
        speed_up: time in full precision / this time, medians; None where full precision did not run.
        speed_up_16: the same of 16 bits.
    """

    bundle: str
    layout: str
    backend: str
    case: str
    formats: dict[str, int]
    samples: int
    rows: int
    calls: int
    steps_per_second: float
    median_ms: float
    least_ms: float
    p10_ms: float
    p90_ms: float
    picture_seconds: float
    speed_up: float | None
    speed_up_16: float | None = None


class Start(_Record):
    """Seconds and memory that a bundle's plans take before and beside their steps.

    Attributes:
        bundle: path as it was given.
        kernels: whether those that an earlier run compiled were there; None where the library keeps none.
        load_seconds: to deserialize the plans and make their contexts.
        first_seconds: of the first picture after that.
        next_seconds: of one more.
        memory_bytes: of the card, for plans, weights and buffers.
    """

    bundle: str
    kernels: bool | None
    load_seconds: float
    first_seconds: float
    next_seconds: float
    memory_bytes: int


class BundleTimings(_Record):
    """The result of a benchmark.

    Attributes:
        machine: the one that it was measured on.
        warm_up_rounds: calls of each case before.
        timings: of every case.
        starts: of bundles on a GPU.
    """

    schema_version: Literal[1] = 1
    machine: Machine
    warm_up_rounds: int = WARM_UP_ROUNDS
    timings: tuple[Timing, ...]
    starts: tuple[Start, ...] = ()


@dataclass
class _Case:
    bundle: Bundle
    path: Path
    name: str
    steps: tuple[int, ...]
    runner: Callable[[], StepRunner]
    quantized: bool
    loop_steps: int
    times_ms: list[float] = field(default_factory=list)
    turn: int = 0
    loop: DenoisingLoop | None = None

    def call(self, samples: int) -> float:
        """One step, in milliseconds; the next of the case's steps each time."""
        step = self.steps[self.turn % len(self.steps)]
        self.turn += 1
        runner = self.runner()
        return self._on_device(runner, step, samples) if isinstance(runner, DeviceSteps) else self._here(step, samples)

    def _here(self, step: int, samples: int) -> float:
        bundle = self.bundle
        latents, conditioning = bundle.noise(range(samples)), bundle.conditioning([0] * samples)
        inputs = bundle.step_inputs(step, latents, conditioning, bundle.manifest.guidance)
        began = time.perf_counter()
        bundle.predict(step, inputs, self.quantized)
        return 1e3 * (time.perf_counter() - began)

    def _on_device(self, runner: DeviceSteps, step: int, samples: int) -> float:
        """By the device's events: conditioning and latents lie there already, as in the loop."""
        if self.loop is None:
            request = self.bundle.request(self.bundle.noise(range(samples)), self.bundle.conditioning([0] * samples))
            self.loop = runner.loop(request)
        return runner.timed(self.loop, self.loop.request.latents, step)


def benchmark_bundles(
    paths: Sequence[Path],
    backend: BackendName,
    samples: int,
    rounds: int,
    on_round: Callable[[], None] | None = None,
    uniform: MakeUniform | None = None,
) -> BundleTimings:
    """Time the steps of bundles on this machine.

    Args:
        paths: of bundles or run directories.
        backend: name of the backend; "auto" for the best that runs each. Beside plans of TensorRT-RTX their model is
            compiled in 16 bits and in full precision.
        samples: in one call.
        rounds: calls of each case that are timed.
        on_round: called after each round, warm-up included.
        uniform: makes plans in one format everywhere, to be timed beside a bundle's own.

    Raises:
        UserError: as `Bundle.open`; more samples than an optimization profile admits.
    """
    with ExitStack() as stack:
        bundles = [(path, stack.enter_context(Bundle.open(path, backend))) for path in paths]
        cases = [case for path, bundle in bundles for case in _cases(bundle, path, samples, stack, uniform)]
        for turn in range(WARM_UP_ROUNDS + rounds):
            for case in cases:
                elapsed_ms = case.call(samples)
                if turn >= WARM_UP_ROUNDS:
                    case.times_ms.append(elapsed_ms)
            if on_round is not None:
                on_round()
        medians = {(case.path, case.name): statistics.median(case.times_ms) for case in cases}
        timings = tuple(_timing(case, samples, medians) for case in cases)
        ran = dict.fromkeys(bundle.choice.name for _, bundle in bundles)
    starts = tuple(start for path, bundle in bundles if bundle.choice.plans for start in _starts(path, bundle))
    return BundleTimings(machine=machine(*ran), timings=timings, starts=starts)


def _cases(bundle: Bundle, path: Path, samples: int, stack: ExitStack, uniform: MakeUniform | None) -> list[_Case]:
    policy, own, steps = bundle.policy, partial(bundle.runner, True), bundle.policy.steps
    firsts = [policy.step_assignments.index(i) for i in range(len(policy.assignments))]
    cases = [_Case(bundle, path, "policy", tuple(range(steps)), own, True, steps)]
    cases += [_Case(bundle, path, f"assignment {i}", (step,), own, True, steps) for i, step in enumerate(firsts)]
    if not bundle.choice.plans:
        return [*cases, _Case(bundle, path, FULL_PRECISION, (0,), partial(bundle.runner, False), False, steps)]
    rows = samples * (2 if bundle.files.two_branches else 1)
    files = None if uniform is None else _made(uniform, bundle, rows)
    if files is not None:
        other = stack.enter_context(Bundle(files, bundle.choice.name))
        for step in range(other.policy.steps):
            name = f"uniform {next(iter(other.formats(step).values())).name}"
            cases.append(_Case(other, path, name, (step,), partial(other.runner, True), True, steps))
    for name, runner in _comparisons(bundle, rows).items():
        stack.enter_context(runner)
        cases.append(_Case(bundle, path, name, (0,), partial(_same, runner), False, steps))
    return cases


def _made(uniform: MakeUniform, bundle: Bundle, rows: int) -> BundleFiles | None:
    """Plans in one format each; what is timed beside them does not depend on them."""
    try:
        return uniform(bundle.files, bundle.choice, rows)
    except AdatsqError as error:
        log.warning("no plans in one format: %s; --no-uniform does not try", error)
        return None


def _same(runner: StepRunner) -> StepRunner:
    return runner


def _comparisons(bundle: Bundle, rows: int) -> dict[str, StepRunner]:
    """Plans of the same model without formats, compiled for this."""
    if bundle.choice.name != "rtx" or bundle.sizes:
        log.info("'%s': there is nothing to compare with: plans of TensorRT-RTX of one size only", bundle.files.folder)
        return {}
    plans = build_comparison_plans(bundle.files, bundle.choice.plans[0].target, rows)
    return {name: ComparisonSteps(bundle.files, plan, name, rows) for name, plan in plans.items()}


def _starts(path: Path, bundle: Bundle) -> Iterator[Start]:
    """Without compiled kernels, and with those that this leaves behind."""
    files, rtx = bundle.files, bundle.choice.name == "rtx"
    ways: dict[bool | None, Callable[[], DeviceSteps]] = (
        {False: partial(RtxSteps, files, keep_kernels=False), True: partial(RtxSteps, files)}
        if rtx
        else {None: partial(TensorRTSteps, files)}
    )
    for kernels, make in ways.items():
        yield _start(path, bundle, kernels, make)


def _start(path: Path, bundle: Bundle, kernels: bool | None, make: Callable[[], DeviceSteps]) -> Start:
    began = time.perf_counter()
    with make() as runner:
        seconds = [time.perf_counter() - began]
        for _ in range(2):
            began = time.perf_counter()
            with runner.working():
                request = bundle.request(bundle.noise([0]), bundle.conditioning([0]))
                *_, _last = runner.loop(request).run()
                runner.synchronize()
            seconds.append(time.perf_counter() - began)
        memory = runner.used_bytes()
    return Start(
        bundle=str(path),
        kernels=kernels,
        load_seconds=seconds[0],
        first_seconds=seconds[1],
        next_seconds=seconds[2],
        memory_bytes=memory,
    )


def _timing(case: _Case, samples: int, medians: Mapping[tuple[Path, str], float]) -> Timing:
    times, bundle = sorted(case.times_ms), case.bundle
    median = statistics.median(times)
    counts = Counter(fmt.name for step in case.steps for fmt in bundle.formats(step).values())
    return Timing(
        bundle=str(case.path),
        layout=bundle.manifest.layout,
        backend=bundle.choice.name,
        case=case.name,
        formats=dict(sorted(counts.items())) if case.quantized else {},
        samples=samples,
        rows=samples * (2 if bundle.files.two_branches else 1),
        calls=len(times),
        steps_per_second=1e3 / median,
        median_ms=median,
        least_ms=times[0],
        p10_ms=times[len(times) // 10],
        p90_ms=times[min(9 * len(times) // 10, len(times) - 1)],
        picture_seconds=case.loop_steps * median / 1e3,
        speed_up=_ratio(medians.get((case.path, FULL_PRECISION)), median),
        speed_up_16=_ratio(medians.get((case.path, SIXTEEN_BITS)), median),
    )


def _ratio(other_ms: float | None, own_ms: float) -> float | None:
    return None if other_ms is None else other_ms / own_ms


def machine(*backends: BackendName) -> Machine:
    """This machine, as far as it matters for the figures of backends."""
    versions, gpu = dict[str, str](), None
    for backend in backends:
        library = _LIBRARIES[backend]()
        versions[library.title] = library.version()
        if backend != "onnxruntime":
            gpu = gpu_name()
    name, flags = processor()
    return Machine(
        processor=name,
        instructions=tuple(flag for flag in INTEGER_INSTRUCTIONS if flag in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpu=gpu,
        versions=versions,
    )

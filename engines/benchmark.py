"""How long a bundle's steps take on this machine: as the policy has them, in each assignment, and in full precision.

All cases take turns, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.selection import BackendName
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend
from adatsq_trt.engines.processor import INTEGER_INSTRUCTIONS, processor
from adatsq_trt.engines.runtime import Bundle

WARM_UP_ROUNDS = 2


_LIBRARIES = {
    "rtx": RtxBackend,
    "tensorrt": TensorRTBackend,
    "cuda": OnnxRuntimeBackend,
    "onnxruntime": OnnxRuntimeBackend,
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Record):
    """What the figures were measured on.

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
        backend: what ran it.
        case: "policy" (every step in turn), "assignment 3" or "full precision".
        formats: format → (step, layer) pairs or layers that have it; empty in full precision.
        samples: in one call.
        rows: of one call: samples times guidance branches.
        calls: that were timed, after the warm-up.
        steps_per_second: of the median.
        median_ms, least_ms, p10_ms, p90_ms: of one step.
        speed_up: time in full precision / this time, medians; None where full precision did not run.
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
    speed_up: float | None


class BundleTimings(_Record):
    """The result of a benchmark: machine and rows."""

    schema_version: Literal[1] = 1
    machine: Machine
    warm_up_rounds: int = WARM_UP_ROUNDS
    timings: tuple[Timing, ...]


@dataclass
class _Case:
    bundle: Bundle
    path: Path
    name: str
    steps: tuple[int, ...]
    quantized: bool
    times_ms: list[float]
    turn: int = 0

    def call(self, samples: int) -> float:
        """One step, in milliseconds; the next of the case's steps each time."""
        bundle, step = self.bundle, self.steps[self.turn % len(self.steps)]
        self.turn += 1
        latents, conditioning = bundle.noise(range(samples)), bundle.conditioning([0] * samples)
        inputs = bundle.step_inputs(step, latents, conditioning, bundle.manifest.guidance)
        began = time.perf_counter()
        bundle.predict(step, inputs, self.quantized)
        return 1e3 * (time.perf_counter() - began)


def benchmark_bundles(
    paths: Sequence[Path],
    backend: BackendName,
    samples: int,
    rounds: int,
    on_round: Callable[[], None] | None = None,
) -> BundleTimings:
    """Time the steps of bundles on this machine.

    Args:
        paths: of bundles or run directories.
        backend: what runs them; "auto" for the best that runs each. Plans have no full precision beside them.
        samples: in one call.
        rounds: calls of each case that are timed.
        on_round: called after each round, warm-up included.

    Raises:
        UserError: as `Bundle.open`; more samples than an optimization profile admits.
    """
    with ExitStack() as stack:
        bundles = [(path, stack.enter_context(Bundle.open(path, backend))) for path in paths]
        cases = [case for path, bundle in bundles for case in _cases(bundle, path)]
        for turn in range(WARM_UP_ROUNDS + rounds):
            for case in cases:
                elapsed_ms = case.call(samples)
                if turn >= WARM_UP_ROUNDS:
                    case.times_ms.append(elapsed_ms)
            if on_round is not None:
                on_round()
        full = {case.path: statistics.median(case.times_ms) for case in cases if not case.quantized}
        timings = tuple(_timing(case, samples, full.get(case.path)) for case in cases)
        ran = dict.fromkeys(bundle.choice.name for _, bundle in bundles)
    return BundleTimings(machine=machine(*ran), timings=timings)


def _cases(bundle: Bundle, path: Path) -> list[_Case]:
    policy = bundle.policy
    firsts = [policy.step_assignments.index(i) for i in range(len(policy.assignments))]
    cases = [_Case(bundle, path, "policy", tuple(range(policy.steps)), True, [])]
    cases += [_Case(bundle, path, f"assignment {i}", (step,), True, []) for i, step in enumerate(firsts)]
    if not bundle.choice.plans:
        cases.append(_Case(bundle, path, "full precision", (0,), False, []))
    return cases


def _timing(case: _Case, samples: int, full_ms: float | None) -> Timing:
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
        speed_up=None if full_ms is None else full_ms / median,
    )


def machine(*backends: BackendName) -> Machine:
    """This machine, as far as it matters for the figures of backends."""
    versions, gpu = dict[str, str](), None
    for backend in backends:
        library = _LIBRARIES[backend]()
        versions[library.title] = library.version()
        if backend != "onnxruntime":
            import torch

            gpu = torch.cuda.get_device_name()
    name, flags = processor()
    return Machine(
        processor=name,
        instructions=tuple(flag for flag in INTEGER_INSTRUCTIONS if flag in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpu=gpu,
        versions=versions,
    )

"""How far two runners are apart, by polygraphy's own comparators, and the command that compares them again."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import (
    Comparator,
    IterationResult,
    OutputCompareResult,
    RunResults,
    SimpleCompareFunc,
    SnrCompareFunc,
    SnrResult,
)
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import atomic_path

Arrays = Mapping[str, np.ndarray]
CPU_NAME = "onnxruntime"
# Every node as it is written: fusions of quantized nodes belong to ONNX Runtime, not to the graph that is checked.
_OPTIMIZATION = "ORT_ENABLE_BASIC"


@dataclass(frozen=True)
class Tolerance:
    """What two correct computations may differ by.

    Attributes:
        median: median over the elements of |got - expected|, in units of the expected output's root mean square.
        relative: |got - expected| / |got|, Euclidean norms over the whole batch.
    """

    median: float
    relative: float


@dataclass(frozen=True)
class Figures:
    """What two computations do differ by; the worst output counts.

    Attributes:
        median: as in `Tolerance`; None when the outputs cannot be compared (other shapes, not finite).
        relative: as in `Tolerance`; None likewise.
        passed: polygraphy's verdict, and every output was compared.
    """

    median: float | None
    relative: float | None
    passed: bool


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy's log off the screen: a row of the report says what it found."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def run_in_onnxruntime(graph: Path, feeds: Sequence[Arrays]) -> RunResults:
    """Run a graph once for each feed, with one session.

    Raises:
        AdatsqError: the graph cannot be loaded or does not take these inputs.
    """
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.__members__[_OPTIMIZATION]
    session = SessionFromOnnx(str(graph), providers=["cpu"], graph_optimization_level=level)
    # Neither library documents a common base for what goes wrong with a graph or its inputs.
    try:
        with quiet_polygraphy():
            return Comparator.run([OnnxrtRunner(session, name=CPU_NAME)], data_loader=list(feeds))
    except Exception as error:
        raise AdatsqError(
            f"ONNX Runtime cannot run '{graph}' with inputs {sorted(feeds[0])}: {error}; "
            "run 'adatsq-trt build engine' again"
        ) from error


def run_results(runner: str, outputs: Arrays) -> RunResults:
    """Outputs that were computed elsewhere, as polygraphy's results of one iteration."""
    results = RunResults()
    results.append((runner, [IterationResult(outputs=dict(outputs), runtime=0.0, runner_name=runner)]))
    return results


def compare(got: Arrays, expected: Arrays, tolerance: Tolerance) -> Figures:
    """Compare the outputs of two runners.

    Args:
        got: of the graph that is checked.
        expected: of the reference.
        tolerance: both of its figures must hold.
    """
    results = run_results("got", got)
    results.extend(run_results("expected", expected))
    scales = _root_mean_squares(expected)
    functions = [
        SimpleCompareFunc(check_error_stat="median", rtol=0.0, atol=_absolute(scales, tolerance)),
        SnrCompareFunc(snr_threshold=_decibels(tolerance.relative)),
    ]
    with quiet_polygraphy():
        median, noise = Comparator.compare_accuracy(results, compare_func=functions)
        verdict = bool(median) and bool(noise)
    medians = [_median(row, scales[name]) for name, row in _only_iteration(median).items()]
    relatives = [_relative(row) for row in _only_iteration(noise).values()]
    complete = len(medians) == len(relatives) == len(expected) == len(got) > 0
    return Figures(_worst(medians), _worst(relatives), verdict and complete and None not in (*medians, *relatives))


def _only_iteration(result: Any) -> Mapping[str, Any]:
    """Output name → result, of the one pair's one iteration."""
    ((iteration,),) = result.values()
    return iteration  # type: ignore[no-any-return]


def _median(row: Any, scale: float) -> float | None:
    return _finite(row.median_absdiff / scale) if isinstance(row, OutputCompareResult) else None


def _relative(row: Any) -> float | None:
    return _finite(10 ** (-row.snr / 20)) if isinstance(row, SnrResult) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest, or None when one of them is."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _root_mean_squares(outputs: Arrays) -> dict[str, float]:
    """Size of each output; an output of zeros is measured by the smallest normal number."""
    tiny = float(np.finfo(np.float32).tiny)
    return {name: max(float(np.sqrt(np.mean(np.square(v, dtype=np.float64)))), tiny) for name, v in outputs.items()}


def _absolute(scales: Mapping[str, float], tolerance: Tolerance) -> dict[str, float]:
    return {name: tolerance.median * scale for name, scale in scales.items()}


def _decibels(relative: float) -> float:
    """A relative error as the signal-to-noise ratio that polygraphy reports."""
    return -20 * math.log10(relative)


@dataclass(frozen=True)
class RowFiles:
    """A row's arrays in polygraphy's format, beside the report, and the graph that they belong to.

    Attributes:
        folder: the report's folder.
        name: what the files' names begin with.
        graph: ONNX file that polygraphy runs in ONNX Runtime.
    """

    folder: Path
    name: str
    graph: Path

    def save(self, inputs: Arrays, got: RunResults, expected: RunResults, tolerance: Tolerance) -> str:
        """Write the files.

        Args:
            inputs: of the graph.
            got: its outputs.
            expected: the reference's.
            tolerance: what the command shall hold the outputs to.

        Returns:
            The command that repeats the row, to be run in the report's folder; it exits with 0 if the row passes.
        """
        parts = {"inputs": [dict(inputs)], "got": got, "expected": expected}
        for part, content in parts.items():
            with atomic_path(self.folder / f"{self.name}.{part}.json") as temporary, quiet_polygraphy():
                save_json(content, str(temporary))
        scales = _root_mean_squares(expected[0][1][0])
        return shlex.join(
            [
                *("polygraphy", "run", os.path.relpath(self.graph, self.folder), "--onnxrt", "--validate"),
                *("--graph-optimization-level", _OPTIMIZATION),
                *("--load-inputs", f"{self.name}.inputs.json", "--load-outputs", f"{self.name}.expected.json"),
                *("--compare", "simple", "snr", "--check-error-stat", "median", "--rtol", "0", "--atol"),
                *(f"{name}:{value!r}" for name, value in _absolute(scales, tolerance).items()),
                *("--snr-threshold", repr(_decibels(tolerance.relative))),
            ]
        )

"""Runs and comparisons by polygraphy's own loaders, runners and comparators, and the commands that repeat them."""

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
from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
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

from adatsq_trt.engines.accuracy.tolerances import Tolerance
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import atomic_path

Arrays = Mapping[str, np.ndarray]
CPU_NAME = "onnxruntime"
# Every node as it is written: fusions of quantized nodes belong to ONNX Runtime, not to the graph that is checked.
_OPTIMIZATION = "ORT_ENABLE_BASIC"


@dataclass(frozen=True)
class Figures:
    """Differences between two computations of one output.

    Attributes:
        median: as in `Tolerance`; None when the outputs cannot be compared (other shapes, not finite).
        relative: as in `Tolerance`; None likewise.
        passed: polygraphy's verdict.
    """

    median: float | None
    relative: float | None
    passed: bool


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy's log off the screen: a row of the report says what it found."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def run_in_onnxruntime(
    graph: Path, feeds: Sequence[Arrays], outputs: Sequence[str] = ()
) -> list[dict[str, np.ndarray]]:
    """Run a graph once for each feed, with one session.

    Args:
        graph: ONNX file.
        feeds: input name → array, for each run.
        outputs: names of the values to return instead of the graph's outputs.

    Returns:
        Output name → array, for each feed.

    Raises:
        AdatsqError: the graph cannot be loaded or does not take these inputs.
    """
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.__members__[_OPTIMIZATION]
    model = BytesFromOnnx(ModifyOutputs(OnnxFromPath(str(graph)), outputs=list(outputs))) if outputs else str(graph)
    session = SessionFromOnnx(model, providers=["cpu"], graph_optimization_level=level)
    # Neither library documents a common base for what goes wrong with a graph or its inputs.
    try:
        with quiet_polygraphy():
            results = Comparator.run([OnnxrtRunner(session, name=CPU_NAME)], data_loader=list(feeds))
    except Exception as error:
        raise AdatsqError(
            f"ONNX Runtime cannot run '{graph}' with inputs {sorted(feeds[0])}: {error}; "
            "run 'adatsq-trt build engine' again"
        ) from error
    return [dict(iteration) for iteration in results[0][1]]


def compare(got: Arrays, expected: Arrays, tolerances: Mapping[str, Tolerance]) -> dict[str, Figures]:
    """Compare outputs by name.

    Args:
        got: of the graph that is checked.
        expected: of the reference.
        tolerances: output name → limits, both of which must hold; decides which outputs are compared.
    """
    names = [name for name in tolerances if name in got and name in expected]
    pair = (_iteration("got", {n: got[n] for n in names}), _iteration("expected", {n: expected[n] for n in names}))
    limits = {name: tolerances[name] for name in names}
    absolute = _absolute({name: expected[name] for name in names}, limits)
    functions: list[Any] = [SnrCompareFunc(snr_threshold={n: _decibels(t.relative) for n, t in limits.items()})]
    if absolute:
        functions.append(SimpleCompareFunc(check_error_stat="median", rtol=0.0, atol=absolute))
    with quiet_polygraphy(), np.errstate(all="ignore"):  # what is not finite fails, without a word
        # Not by `Comparator.compare_accuracy`, which takes as long again for statistics of both outputs in its log.
        results = [function(*pair) for function in functions]
    missing = dict.fromkeys(tolerances, Figures(None, None, False))
    return missing | {name: _figures(name, results, limits[name], expected[name]) for name in names}


def _figures(name: str, results: Sequence[Mapping[str, Any]], limit: Tolerance, expected: np.ndarray) -> Figures:
    rows = [result[name] for result in results if name in result]
    relative = next((_finite(10 ** (-row.snr / 20)) for row in rows if isinstance(row, SnrResult)), None)
    scale = _root_mean_square(expected)
    median = next((_finite(row.median_absdiff / scale) for row in rows if isinstance(row, OutputCompareResult)), None)
    known = relative is not None and (limit.median is None or median is not None)
    return Figures(median, relative, known and len(rows) == len(results) and all(bool(row) for row in rows))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _root_mean_square(output: np.ndarray) -> float:
    """Size of an output; one of zeros is measured by the smallest normal number."""
    tiny = float(np.finfo(np.float32).tiny)
    return max(float(np.sqrt(np.mean(np.square(output, dtype=np.float64)))), tiny)


def _absolute(expected: Arrays, tolerances: Mapping[str, Tolerance]) -> dict[str, float]:
    """Output name → limit of the median in the output's own unit, where there is one."""
    medians = {name: limit.median for name, limit in tolerances.items()}
    return {name: m * _root_mean_square(expected[name]) for name, m in medians.items() if m is not None}


def _decibels(relative: float) -> float:
    """A relative error as the signal-to-noise ratio that polygraphy reports."""
    return -20 * math.log10(relative)


def _run_results(runner: str, outputs: Arrays) -> RunResults:
    """Outputs as polygraphy's results of one iteration."""
    results = RunResults()
    results.append((runner, [_iteration(runner, outputs)]))
    return results


def _iteration(runner: str, outputs: Arrays) -> IterationResult:
    return IterationResult(outputs=dict(outputs), runtime=0.0, runner_name=runner)


@dataclass(frozen=True)
class SavedArrays:
    """Inputs of a run and outputs of two computations, in polygraphy's format, in the report's folder.

    Attributes:
        folder: the report's.
        name: beginning of the files' names.
    """

    folder: Path
    name: str

    def save(self, inputs: Arrays, got: Arrays, expected: Arrays, computed_by: str, reference: str) -> None:
        """Write NAME.inputs.json, NAME.got.json and NAME.expected.json.

        Raises:
            OutputError: the folder cannot be written.
        """
        parts = {
            "inputs": [dict(inputs)],
            "got": _run_results(computed_by, got),
            "expected": _run_results(reference, expected),
        }
        for part, content in parts.items():
            with atomic_path(self.folder / f"{self.name}.{part}.json") as temporary, quiet_polygraphy():
                save_json(content, str(temporary))

    def run_command(self, graph: Path, output: str, marked: bool, expected: np.ndarray, tolerance: Tolerance) -> str:
        """The command that computes an output again and compares it; to be run in the report's folder.

        Args:
            graph: ONNX file.
            output: name of the output.
            marked: whether it is a value inside of the graph.
            expected: the reference's, for the unit of the median.
            tolerance: limits that the command checks; its exit code is 0 if both hold.
        """
        words = ["polygraphy", "run", os.path.relpath(graph, self.folder), "--onnxrt", "--validate"]
        words += ["--onnx-outputs", output] if marked else []
        words += ["--graph-optimization-level", _OPTIMIZATION, "--load-inputs", f"{self.name}.inputs.json"]
        words += ["--load-outputs", f"{self.name}.expected.json"]
        return shlex.join([*words, *_compare_words({output: expected}, {output: tolerance})])

    def compare_command(self, expected: Arrays, tolerances: Mapping[str, Tolerance]) -> str:
        """The command that compares the saved outputs again, without running anything."""
        files = [f"{self.name}.{part}.json" for part in ("got", "expected")]
        return shlex.join(["polygraphy", "run", "--load-outputs", *files, *_compare_words(expected, tolerances)])


def _compare_words(expected: Arrays, tolerances: Mapping[str, Tolerance]) -> list[str]:
    absolute = _absolute(expected, tolerances)
    words = ["--compare", *(["simple"] if absolute else []), "snr"]
    if absolute:
        words += ["--check-error-stat", "median", "--rtol", "0", "--atol"]
        words += [f"{name}:{value!r}" for name, value in absolute.items()]
    return [*words, "--snr-threshold", *(f"{n}:{_decibels(t.relative)!r}" for n, t in tolerances.items())]

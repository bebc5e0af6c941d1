"""Check that a bundle's graphs compute what PyTorch computes with the fake-quantized model.

Two comparisons, both by polygraphy:

1. Every step: ONNX Runtime on the step's `cpu` graph, on the calibration inputs, against PyTorch's output.
2. Every `target` graph: one block in onnx's reference evaluator against the same block of the `cpu` graph.

Tolerances of 1. Both sides round the same float32 values to the same grids, but sum in another order, so a value that
lies within float32 noise (about 1e-6 of its size) of a tie may round to the other neighbour. Two figures follow:

- The *median* error over the elements. A coarse grid has few values near a tie: most rows see no flip, and their
  error is float32's own, below 1e-6; the limit of 2^-12 leaves room for rows with one. A 16-bit grid is so fine that
  every row sees flips, each of one unit of 2^-8 of one value among many: up to 2^-11 was measured, the limit is 2^-10.
  Where nothing is rounded the limit is 1e-5. A wrong scale, weight or bias moves nearly all elements, mostly by more
  than 2^-10.
- The *relative* error over the batch, which sees a defect that hits only some rows. The rows that flip differ by no
  more than one step of the coarsest grid in use, relative to the largest magnitude on it (integers: 1 / qmax) or to
  the value itself (2^-mantissa bits - 1). That step is the limit.

Tolerances of 2. Both blocks get the same inputs, but the target block rounds to 16 bit after every operator. Two
effects add up, with u the root mean square of a 16-bit rounding (2^-9 for bfloat16, 2^-12 for float16) and s the
coarsest grid's step:

- some 2^6 roundings that behave like a random walk: 2^3 u;
- rounding flips: a value that is off by u crosses a tie with probability 2 u / s and then moves by s, which has the
  root mean square sqrt(2 u s).

Four quantized layers stand one behind the other in a block, which doubles the second effect, and magnitudes are uneven,
for which another factor of 2 is allowed: the limit of the relative error is 2^3 u + 4 sqrt(2 u s). Flips are few and
large, so half of the elements stay below the root mean square: the median's limit is a quarter of it. `make demo`
(nvfp4 in bfloat16) showed up to 0.078, limit 0.141, and for the median 0.022, limit 0.035.
A float32 target rounds like the cpu graph, so
that the limits of 1. hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.block_check import REFERENCE_NAME, choose_block, run_block
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.engines.bundle import REFERENCE_NAME as REFERENCE_FILE
from adatsq_trt.engines.comparison import (
    CPU_NAME,
    Figures,
    RowFiles,
    Tolerance,
    compare,
    run_in_onnxruntime,
    run_results,
)
from adatsq_trt.errors import DamagedFileError, UserError
from adatsq_trt.files import read_json_model, sha256, write_json_model
from adatsq_trt.formats import FORMATS, Element, Grid

REPORT_NAME = "check.json"
PYTORCH_NAME = "PyTorch, fake-quantized"
FLOAT32_MEDIAN = 1e-5
COARSE_MEDIAN = 2.0**-12
SIXTEEN_BIT_MEDIAN = 2.0**-10
_TYPICAL_ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
_BLOCK_ROUNDINGS = 64


class CheckRow(BaseModel):
    """One comparison.

    Attributes:
        step: whose inputs and scales were fed.
        assignment: index into the policy's assignments.
        variant: which graph is checked.
        block: module path of the block that was cut out; None for the whole graph.
        computed_by: what ran the checked graph.
        reference: what it was compared with.
        median_error: median |got - expected| over the elements, in units of the expected output's root mean square;
            None when the outputs have other shapes or are not finite.
        median_tolerance: its limit.
        relative_error: |got - expected| / |got|, Euclidean norms over all elements; None likewise.
        relative_tolerance: its limit.
        passed: both limits hold, for every output.
        command: repeats the row when run in the report's folder; exit code 0 if it passes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    assignment: int
    variant: Literal["cpu", "target"]
    block: str | None
    computed_by: str
    reference: str
    median_error: float | None
    median_tolerance: float
    relative_error: float | None
    relative_tolerance: float
    passed: bool
    command: str


class CheckReport(BaseModel):
    """All comparisons of a bundle.

    Attributes:
        model: the bundle's model.
        manifest_sha256: of the bundle's manifest, which hashes every other file: the bundle that was checked.
        passed: there is a row for every step and every target graph, and all pass.
        rows: steps first, then target graphs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    manifest_sha256: str
    passed: bool
    rows: tuple[CheckRow, ...]


def check(bundle: BundleFiles, folder: Path, on_row: Callable[[int, int], None] | None = None) -> CheckReport:
    """Compare a bundle's graphs with PyTorch's outputs and with each other.

    Args:
        bundle: opened, hence verified.
        folder: receives `check.json` and every row's arrays in polygraphy's format.
        on_row: called with (rows done, rows in all).

    Raises:
        DamagedFileError: the bundle lacks a step's reference or a graph.
        OutputError: the folder cannot be written.
    """
    targets = [g.assignment for g in bundle.index.graphs if g.variant == "target" and g.assignment is not None]
    expected_rows = bundle.policy.steps + len(targets)
    rows = []
    for row in _rows(bundle, targets, folder):
        rows.append(row)
        if on_row is not None:
            on_row(len(rows), expected_rows)
    rows.sort(key=lambda row: (row.variant, row.step))
    passed = len(rows) == expected_rows and all(row.passed for row in rows)
    report = CheckReport(
        model=bundle.manifest.model, manifest_sha256=_identity(bundle), passed=passed, rows=tuple(rows)
    )
    write_json_model(folder / REPORT_NAME, report)
    return report


def passed_before(bundle: BundleFiles, folder: Path) -> CheckReport | None:
    """The report of an earlier check of this very bundle, if all its rows passed.

    Args:
        bundle: opened, hence verified: equal manifests mean equal files.
        folder: where an earlier report may lie.
    """
    try:
        report = read_json_model(folder / REPORT_NAME, CheckReport)
    except UserError:  # none, or damaged, or of another version: check again
        return None
    return report if report.passed and report.manifest_sha256 == _identity(bundle) else None


def _identity(bundle: BundleFiles) -> str:
    return sha256(bundle.folder / MANIFEST_NAME)


def _rows(bundle: BundleFiles, targets: Iterable[int], folder: Path) -> Iterator[CheckRow]:
    for assignment in range(len(bundle.policy.assignments)):
        yield from _check_steps(bundle, assignment, folder)
    for assignment in targets:
        yield _check_block(bundle, assignment, folder)


def _check_steps(bundle: BundleFiles, assignment: int, folder: Path) -> Iterator[CheckRow]:
    """Every step of an assignment, with one session."""
    graph = bundle.graph("cpu", assignment)
    steps = [step for step, used in enumerate(bundle.policy.step_assignments) if used == assignment]
    tolerance = step_tolerance(bundle.policy.assignments[assignment])
    feeds = [step_feed(bundle, step) for step in steps]
    results = run_in_onnxruntime(bundle.graph_path(graph), feeds)
    for step, feed, iteration in zip(steps, feeds, results[0][1], strict=True):
        got, expected = dict(iteration), {graph.outputs[0].name: _reference_output(bundle, step)}
        files = RowFiles(folder, f"step_{step:03d}", bundle.graph_path(graph))
        command = files.save(feed, run_results(CPU_NAME, got), run_results(PYTORCH_NAME, expected), tolerance)
        figures = compare(got, expected, tolerance)
        yield _row(step, assignment, "cpu", None, figures, tolerance, command)


def _check_block(bundle: BundleFiles, assignment: int, folder: Path) -> CheckRow:
    """One block of a target graph, at the assignment's first step, for one row of each guidance branch."""
    step = bundle.policy.step_assignments.index(assignment)
    feed, block = step_feed(bundle, step), choose_block(bundle, assignment)
    rows = len(_reference_output(bundle, step))
    few = {name: value[:: max(rows // 2, 1)] if value.ndim else value for name, value in feed.items()}
    run = run_block(bundle, assignment, block, few, folder)
    tolerance = block_tolerance(bundle.policy.assignments[assignment], bundle.index.base_type)
    files = RowFiles(folder, f"assignment_{assignment:03d}.{block}", run.graph)
    command = files.save(run.inputs, run.got, run.expected, tolerance)
    figures = compare(dict(run.got[0][1][0]), dict(run.expected[0][1][0]), tolerance)
    return _row(step, assignment, "target", block, figures, tolerance, command)


def _row(
    step: int,
    assignment: int,
    variant: Literal["cpu", "target"],
    block: str | None,
    figures: Figures,
    tolerance: Tolerance,
    command: str,
) -> CheckRow:
    whole = variant == "cpu"
    return CheckRow(
        step=step,
        assignment=assignment,
        variant=variant,
        block=block,
        computed_by=CPU_NAME if whole else REFERENCE_NAME,
        reference=PYTORCH_NAME if whole else f"the cpu graph in {CPU_NAME}",
        median_error=figures.median,
        median_tolerance=tolerance.median,
        relative_error=figures.relative,
        relative_tolerance=tolerance.relative,
        passed=figures.passed,
        command=command,
    )


def step_feed(bundle: BundleFiles, step: int) -> dict[str, np.ndarray]:
    """A step's calibration inputs and activation scales, as its cpu graph takes them.

    Raises:
        DamagedFileError: the bundle does not hold them.
    """
    graph = bundle.graph("cpu", bundle.policy.step_assignments[step])
    inputs = {s.name: _reference(bundle, f"step_{step:03d}.input.{s.name}") for s in graph.inputs}
    return {**inputs, **bundle.scales(step)}


def _reference_output(bundle: BundleFiles, step: int) -> np.ndarray:
    return _reference(bundle, f"step_{step:03d}.output")


def _reference(bundle: BundleFiles, name: str) -> np.ndarray:
    if name not in bundle.reference:
        raise DamagedFileError(
            f"'{bundle.folder / REFERENCE_FILE}' has no '{name}', so the step cannot be checked; "
            "run 'adatsq-trt build engine' again"
        )
    return bundle.reference[name]


def step_tolerance(formats: Sequence[str]) -> Tolerance:
    """Limits for a whole cpu graph against PyTorch; see the head of this file."""
    step = coarsest_step(formats)
    if not step:
        return Tolerance(FLOAT32_MEDIAN, FLOAT32_MEDIAN)
    fine = any(FORMATS[name].activation.element in (Element.BF16, Element.FP16) for name in formats)
    return Tolerance(SIXTEEN_BIT_MEDIAN if fine else COARSE_MEDIAN, step)


def block_tolerance(formats: Sequence[str], base_type: str) -> Tolerance:
    """Limits for a target block against the cpu block; see the head of this file."""
    if base_type == "float32":
        return step_tolerance(formats)
    unit = _TYPICAL_ROUNDING[base_type]
    relative = unit * _BLOCK_ROUNDINGS**0.5 + 4 * (2 * unit * coarsest_step(formats)) ** 0.5
    return Tolerance(max(relative / 4, FLOAT32_MEDIAN), max(relative, FLOAT32_MEDIAN))


def coarsest_step(formats: Iterable[str]) -> float:
    """Largest step of the activation grids in use; 0 when nothing is rounded."""
    return max(_step(FORMATS[name].activation) for name in formats)


def _step(grid: Grid) -> float:
    if grid.element is Element.INT:
        return 1 / grid.maximum
    relative = {Element.FP32: 0.0, Element.FP16: 2.0**-11, Element.BF16: 2.0**-8, Element.E4M3: 2.0**-4}
    return relative.get(grid.element, 2.0**-2)

"""The rows of a check: which graphs run on which inputs, and what their outputs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from adatsq_trt.engines.accuracy.block_cut import load_graph
from adatsq_trt.engines.accuracy.blocks import REFERENCE_NAME, BlockPair
from adatsq_trt.engines.accuracy.comparison import CPU_NAME, Arrays, SavedArrays, compare, run_in_onnxruntime
from adatsq_trt.engines.accuracy.loop import check_loop
from adatsq_trt.engines.accuracy.references import OUTPUT_SUFFIX, Reference
from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow, write_report
from adatsq_trt.engines.accuracy.tolerances import Tolerance, block_tolerance, graph_tolerance
from adatsq_trt.engines.accuracy.written_formats import written_formats
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.errors import AdatsqError, UserError
from adatsq_trt.files import read_json_model, sha256

PYTORCH_NAME = "PyTorch, fake-quantized"


@dataclass(frozen=True)
class Subject:
    """Where a comparison belongs.

    Attributes:
        bucket: index into the policy's buckets.
        step: whose inputs and scales are fed.
        assignment: index into the policy's assignments.
        variant: which graph is checked.
        block: module path; None for the whole graph.
    """

    bucket: int
    step: int
    assignment: int
    variant: Literal["cpu", "target"]
    block: str | None = None


def work_units(bundle: BundleFiles) -> int:
    """How often `check` reports progress."""
    policy, blocks = bundle.policy, len(bundle.index.blocks)
    return policy.steps + len(policy.buckets) + len(_targets(bundle)) * blocks + 1


def check(
    bundle: BundleFiles, folder: Path, fail_above: float | None = None, on_unit: Callable[[], None] | None = None
) -> CheckReport:
    """Compare a bundle's graphs with PyTorch's outputs, with each other, and run the whole loop.

    Args:
        bundle: opened, hence verified.
        folder: receives `check.json` and all arrays in polygraphy's format.
        fail_above: largest relative error of the last latent against full precision; None for no limit.
        on_unit: called `work_units` times.

    Raises:
        DamagedFileError: the bundle lacks a reference or a graph.
        OutputError: the folder cannot be written.
    """
    rows: list[CheckRow] = []
    for unit in _units(bundle, folder):
        rows += unit
        if on_unit is not None:
            on_unit()
    loop = check_loop(bundle, folder, fail_above)
    if on_unit is not None:
        on_unit()
    report = CheckReport(
        model=bundle.manifest.model,
        manifest_sha256=_identity(bundle),
        passed=loop.passed and all(row.passed for row in rows),
        buckets=tuple((bucket.first, bucket.last) for bucket in bundle.policy.buckets),
        rows=tuple(sorted(rows, key=lambda row: (row.bucket, row.variant))),
        loop=loop,
    )
    write_report(folder, report)
    return report


def passed_before(bundle: BundleFiles, folder: Path, fail_above: float | None = None) -> CheckReport | None:
    """The report of an earlier check of this very bundle with this limit, if all its rows passed.

    Args:
        bundle: opened, hence verified: equal manifests mean equal files.
        folder: where an earlier report may lie.
        fail_above: as in `check`.
    """
    try:
        report = read_json_model(folder / REPORT_NAME, CheckReport)
    except UserError:  # none, or damaged, or of another version: check again
        return None
    same = report.manifest_sha256 == _identity(bundle) and report.loop.fail_above == fail_above
    return report if report.passed and same else None


def _identity(bundle: BundleFiles) -> str:
    return sha256(bundle.folder / MANIFEST_NAME)


def _targets(bundle: BundleFiles) -> list[int]:
    return [g.assignment for g in bundle.index.graphs if g.variant == "target" and g.assignment is not None]


def _units(bundle: BundleFiles, folder: Path) -> Iterator[list[CheckRow]]:
    reference = Reference(bundle)
    for assignment in range(len(bundle.policy.assignments)):
        yield from _check_steps(bundle, reference, assignment, folder)
    for assignment in _targets(bundle):
        yield from _check_blocks(bundle, reference, assignment, folder)


def _check_steps(bundle: BundleFiles, reference: Reference, assignment: int, folder: Path) -> Iterator[list[CheckRow]]:
    """Every layer at the first step of every bucket of an assignment, and the output of its every step."""
    policy = bundle.policy
    firsts = [bucket.first for bucket in policy.buckets if bucket.assignment == assignment]
    steps = [step for step, used in enumerate(policy.step_assignments) if used == assignment]
    graph = bundle.cpu_graph(steps[0])
    runs = [
        *(_CpuRun(_subject(bundle, step), reference.layers(step), ".layers") for step in firsts),
        *(_CpuRun(_subject(bundle, step), {graph.outputs[0].name: reference.output(step)}) for step in steps),
    ]
    yield from _run_cpu(bundle, runs, folder)


def check_layers(bundle: BundleFiles, step: int, expected: Arrays, folder: Path) -> list[CheckRow]:
    """All layers of a step's cpu graph, in the order of execution.

    Args:
        bundle: opened.
        step: index in the loop.
        expected: module path → PyTorch's output of the layer, for evenly spaced rows of the step's inputs.
        folder: the report's.
    """
    return next(_run_cpu(bundle, [_CpuRun(_subject(bundle, step), expected, ".layers")], folder))


def _subject(bundle: BundleFiles, step: int) -> Subject:
    return Subject(_bucket(bundle, step), step, bundle.policy.step_assignments[step], "cpu")


@dataclass(frozen=True)
class _CpuRun:
    """A run of a cpu graph: where it belongs and what PyTorch computed, by layer or by name of the graph's output."""

    subject: Subject
    expected: Arrays
    suffix: str = ""


def _run_cpu(bundle: BundleFiles, runs: Sequence[_CpuRun], folder: Path) -> Iterator[list[CheckRow]]:
    """Run a cpu graph, once for each of `runs`, with one session that gives out all layers."""
    reference, graph = Reference(bundle), bundle.cpu_graph(runs[0].subject.step)
    path, layers = bundle.graph_path(graph), bundle.policy.layers
    feeds = [reference.feed(run.subject.step, len(next(iter(run.expected.values())))) for run in runs]
    names = {name: name for name in (graph.outputs[0].name, *(f"{layer}{OUTPUT_SUFFIX}" for layer in layers))}
    failure, results = None, [dict[str, np.ndarray]() for _ in runs]
    try:
        names = _outputs(path, layers, graph.outputs[0].name)
        results = run_in_onnxruntime(path, feeds, list(names))
    except AdatsqError as error:
        failure = str(error)
    for run, feed, got in zip(runs, feeds, results, strict=True):
        expected = {output: run.expected[key] for output, key in names.items() if key in run.expected}
        comparison = _Comparison(bundle, run.subject, folder, f"step_{run.subject.step:03d}{run.suffix}", path)
        if failure is not None:
            yield [comparison.failed(feed, expected, failure)]
        else:
            computed = {output: got[output] for output in expected if output in got}
            yield comparison.rows(feed, computed, expected, marked=bool(run.suffix))


def _outputs(graph: Path, layers: Sequence[str], output: str) -> dict[str, str]:
    """Value → layer or graph output, in the order in which the graph computes them.

    Raises:
        AdatsqError: the file is not an ONNX graph, or a layer's output is not in it.
    """
    place = {name: index for index, node in enumerate(load_graph(graph).graph.node) for name in node.output}
    values = {f"{layer}{OUTPUT_SUFFIX}": layer for layer in layers} | {output: output}
    missing = [value for value in values if value not in place]
    if missing:
        raise AdatsqError(f"'{graph}' computes no '{missing[0]}'; run 'adatsq-trt build engine' again")
    return {value: values[value] for value in sorted(values, key=place.__getitem__)}


def _check_blocks(bundle: BundleFiles, reference: Reference, assignment: int, folder: Path) -> Iterator[list[CheckRow]]:
    """All blocks of a target graph, at the assignment's first step, for one row of each guidance branch."""
    step = bundle.policy.step_assignments.index(assignment)
    pair = BlockPair(bundle, assignment, reference.feed(step, rows=2))
    for block in bundle.index.blocks:
        subject = Subject(_bucket(bundle, step), step, assignment, "target", block)
        name = f"assignment_{assignment:03d}.{block}"
        path = folder / f"{name}.onnx"
        comparison = _Comparison(bundle, subject, folder, name, path)
        try:
            run = pair.run(block, path)
        except UserError:
            raise
        except AdatsqError as error:
            yield [comparison.failed({}, {}, str(error))]
        else:
            rows = comparison.rows(run.inputs, run.got, run.expected, marked=True)
            written = written_formats(bundle, "target", step)
            yield [_with_written_format(row, written) for row in rows]


def _with_written_format(row: CheckRow, written: Mapping[str, Sequence[str]]) -> CheckRow:
    """Fail a layer that is written in another format than the policy says: in 16 bits the figures may not show it."""
    names = written.get(row.layer or "", ())
    if not names or row.format in names:
        return row
    return row.model_copy(update={"passed": False, "failure": f"the graph computes the layer in {', '.join(names)}"})


def _bucket(bundle: BundleFiles, step: int) -> int:
    return next(i for i, bucket in enumerate(bundle.policy.buckets) if bucket.first <= step <= bucket.last)


@dataclass(frozen=True)
class _Comparison:
    """One run of a graph and what it is compared with.

    Attributes:
        bundle: opened.
        subject: where it belongs.
        folder: the report's.
        name: what the names of the saved arrays begin with.
        graph: ONNX file that ONNX Runtime ran.
    """

    bundle: BundleFiles
    subject: Subject
    folder: Path
    name: str
    graph: Path

    @property
    def tolerance(self) -> Tolerance:
        """What all outputs are held to."""
        formats = self.bundle.policy.assignments[self.subject.assignment]
        if self.subject.variant == "cpu":
            return graph_tolerance(formats)
        return block_tolerance(formats, self.bundle.index.base_type)

    def rows(self, inputs: Arrays, got: Arrays, expected: Arrays, marked: bool) -> list[CheckRow]:
        """Save the arrays and compare each output.

        Args:
            inputs: of the graph.
            got: its outputs.
            expected: the reference's, in the order of the rows.
            marked: whether the outputs are values inside of the graph.
        """
        saved = SavedArrays(self.folder, self.name)
        saved.save(inputs, got, expected, *self._names)
        tolerance = self.tolerance
        figures = compare(got, expected, dict.fromkeys(expected, tolerance))
        return [
            self._row(
                output=output,
                median=figures[output].median,
                relative=figures[output].relative,
                passed=figures[output].passed,
                failure=None,
                command=saved.run_command(self.graph, output, marked, value, tolerance),
            )
            for output, value in expected.items()
        ]

    def failed(self, inputs: Arrays, expected: Arrays, failure: str) -> CheckRow:
        """The row of a graph that does not run; its command fails in the same way."""
        saved = SavedArrays(self.folder, self.name)
        saved.save(inputs, {}, expected, *self._names)
        output, value = next(iter(expected.items()), ("", np.zeros(1, np.float32)))
        command = saved.run_command(self.graph, output, False, value, self.tolerance)
        return self._row(output="", median=None, relative=None, passed=False, failure=failure, command=command)

    @property
    def _names(self) -> tuple[str, str]:
        """What computed both sides."""
        # A target block is the reference of its cpu twin for polygraphy, which runs the twin only.
        return CPU_NAME, PYTORCH_NAME if self.subject.variant == "cpu" else REFERENCE_NAME

    def _row(
        self, output: str, median: float | None, relative: float | None, passed: bool, failure: str | None, command: str
    ) -> CheckRow:
        subject, whole = self.subject, self.subject.variant == "cpu"
        formats: Mapping[str, str] = dict(
            zip(self.bundle.policy.layers, self.bundle.policy.assignments[subject.assignment], strict=True)
        )
        layer = output.removesuffix(OUTPUT_SUFFIX)
        return CheckRow(
            bucket=subject.bucket,
            step=subject.step,
            assignment=subject.assignment,
            variant=subject.variant,
            block=subject.block,
            layer=layer if layer in formats else None,
            format=formats.get(layer),
            computed_by=CPU_NAME if whole else REFERENCE_NAME,
            reference=PYTORCH_NAME if whole else f"the cpu graph in {CPU_NAME}",
            median_error=median,
            median_tolerance=self.tolerance.median or 0.0,
            relative_error=relative,
            relative_tolerance=self.tolerance.relative,
            passed=passed,
            failure=failure,
            command=command,
        )

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
from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow, write_report
from adatsq_trt.engines.accuracy.tolerances import Tolerance, block_tolerance, graph_tolerance
from adatsq_trt.engines.bundle import MANIFEST_NAME, Bundle
from adatsq_trt.errors import AdatsqError, UserError
from adatsq_trt.files import read_json_model, sha256

PYTORCH_NAME = "PyTorch, fake-quantized"
_OUTPUT_SUFFIX = ".output"


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


def work_units(bundle: Bundle) -> int:
    """How often `check` reports progress."""
    policy, blocks = bundle.policy, len(bundle.index.blocks)
    return policy.steps + len(policy.buckets) + len(_targets(bundle)) * blocks + 1


def check(
    bundle: Bundle, folder: Path, fail_above: float | None = None, on_unit: Callable[[], None] | None = None
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


def passed_before(bundle: Bundle, folder: Path, fail_above: float | None = None) -> CheckReport | None:
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


def _identity(bundle: Bundle) -> str:
    return sha256(bundle.folder / MANIFEST_NAME)


def _targets(bundle: Bundle) -> list[int]:
    return [g.assignment for g in bundle.index.graphs if g.variant == "target" and g.assignment is not None]


def _units(bundle: Bundle, folder: Path) -> Iterator[list[CheckRow]]:
    reference = Reference(bundle)
    for index, bucket in enumerate(bundle.policy.buckets):
        subject = Subject(index, bucket.first, bucket.assignment, "cpu")
        yield check_layers(bundle, subject, reference.layers(bucket.first), folder)
    for assignment in range(len(bundle.policy.assignments)):
        yield from _check_steps(bundle, reference, assignment, folder)
    for assignment in _targets(bundle):
        yield from _check_blocks(bundle, reference, assignment, folder)


def check_layers(bundle: Bundle, subject: Subject, expected: Arrays, folder: Path) -> list[CheckRow]:
    """All layers of a cpu graph at one step, in the order of execution.

    Args:
        bundle: opened.
        subject: the step and its graph.
        expected: module path → PyTorch's output of the layer, for evenly spaced rows of the step's inputs.
        folder: the report's.
    """
    graph = bundle.graph("cpu", subject.assignment)
    path = bundle.graph_path(graph)
    rows = len(next(iter(expected.values())))
    feed = Reference(bundle).feed(subject.step, rows)
    comparison = _Comparison(bundle, subject, folder, f"step_{subject.step:03d}.layers", path)
    try:
        outputs = {f"{layer}{_OUTPUT_SUFFIX}": expected[layer] for layer in execution_order(path, list(expected))}
        (got,) = run_in_onnxruntime(path, [feed], list(outputs))
    except AdatsqError as error:
        return [comparison.failed(feed, {}, str(error))]
    return comparison.rows(feed, got, outputs, marked=True)


def _check_steps(bundle: Bundle, reference: Reference, assignment: int, folder: Path) -> Iterator[list[CheckRow]]:
    """Every step of an assignment, with one session."""
    graph = bundle.graph("cpu", assignment)
    path = bundle.graph_path(graph)
    steps = [step for step, used in enumerate(bundle.policy.step_assignments) if used == assignment]
    feeds = [reference.feed(step) for step in steps]
    failure, results = None, [dict[str, np.ndarray]() for _ in steps]
    try:
        results = run_in_onnxruntime(path, feeds)
    except AdatsqError as error:
        failure = str(error)
    for step, feed, got in zip(steps, feeds, results, strict=True):
        subject = Subject(_bucket(bundle, step), step, assignment, "cpu")
        comparison = _Comparison(bundle, subject, folder, f"step_{step:03d}", path)
        expected = {graph.outputs[0].name: reference.output(step)}
        rows = comparison.rows(feed, got, expected, marked=False)
        yield rows if failure is None else [comparison.failed(feed, expected, failure)]


def _check_blocks(bundle: Bundle, reference: Reference, assignment: int, folder: Path) -> Iterator[list[CheckRow]]:
    """All blocks of a target graph, at the assignment's first step, for one row of each guidance branch."""
    step = bundle.policy.step_assignments.index(assignment)
    pair, feed = BlockPair(bundle, assignment), reference.feed(step, rows=2)
    for block in bundle.index.blocks:
        subject = Subject(_bucket(bundle, step), step, assignment, "target", block)
        name = f"assignment_{assignment:03d}.{block}"
        path = folder / f"{name}.onnx"
        layers = [layer for layer in bundle.policy.layers if layer.startswith(f"{block}.")]
        comparison = _Comparison(bundle, subject, folder, name, path)
        try:
            run = pair.run(block, [f"{layer}{_OUTPUT_SUFFIX}" for layer in layers], feed, path)
        except UserError:
            raise
        except AdatsqError as error:
            yield [comparison.failed({}, {}, str(error))]
        else:
            yield comparison.rows(run.inputs, run.got, run.expected, marked=True)


def _bucket(bundle: Bundle, step: int) -> int:
    return next(i for i, bucket in enumerate(bundle.policy.buckets) if bucket.first <= step <= bucket.last)


def execution_order(graph: Path, layers: Sequence[str]) -> list[str]:
    """Layers in the order in which a graph computes their outputs; those that it does not compute come last.

    Raises:
        AdatsqError: the file is not an ONNX graph.
    """
    nodes = load_graph(graph).graph.node
    place = {name: index for index, node in enumerate(nodes) for name in node.output}
    return sorted(layers, key=lambda layer: place.get(f"{layer}{_OUTPUT_SUFFIX}", len(nodes)))


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

    bundle: Bundle
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
        layer = output.removesuffix(_OUTPUT_SUFFIX)
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

"""The rows of a check: which graphs run on which inputs, and what their outputs are compared with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adatsq_trt.engines.accuracy.block_cut import load_graph
from adatsq_trt.engines.accuracy.blocks import REFERENCE_NAME, BlockPair
from adatsq_trt.engines.accuracy.comparison import CPU_NAME, Arrays, SavedArrays, compare, run_in_onnxruntime
from adatsq_trt.engines.accuracy.exact import check_exactly
from adatsq_trt.engines.accuracy.loop import check_loop, plan_output_tolerance
from adatsq_trt.engines.accuracy.marked_plans import MarkedRun, run_marked
from adatsq_trt.engines.accuracy.references import BRANCH_SUFFIX, OUTPUT_SUFFIX, Reference
from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow, Variant, write_report
from adatsq_trt.engines.accuracy.separate_layers import chosen_outputs, given_inputs, write_separated
from adatsq_trt.engines.accuracy.tolerances import (
    FLOAT32,
    Tolerance,
    block_tolerance,
    layer_tolerance,
    output_tolerance,
    unquantized_tolerance,
)
from adatsq_trt.engines.accuracy.written_formats import written_formats
from adatsq_trt.engines.backends.selection import BackendName, choose
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import AdatsqError, UserError
from adatsq_trt.files import read_json_model, sha256

PYTORCH_NAME, FULL_PRECISION_NAME = "PyTorch, fake-quantized", "PyTorch, full precision"
_LONGEST_NAME = 120  # of a module, in the name of a file
_NO_OUTPUT = ""  # of a graph that does not run and has no known outputs


@dataclass(frozen=True)
class Subject:
    """Where a comparison belongs.

    Attributes:
        bucket: index into the policy's buckets.
        step: the step whose inputs and scales are fed.
        assignment: index into the policy's assignments.
        variant: of the graph that is checked.
        block: module path; None for the whole graph.
        separated: whether every layer is given what the reference computed before it.
    """

    bucket: int
    step: int
    assignment: int
    variant: Variant
    block: str | None = None
    separated: bool = False


def work_units(bundle: BundleFiles) -> int:
    """How often `check` reports progress."""
    policy = bundle.policy
    experts = [bundle.expert(policy.step_assignments.index(assignment)) for assignment in _targets(bundle)]
    pieces = sum(1 + len(bundle.index.blocks_of(expert)) for expert in experts)
    return 2 * policy.steps + len(policy.buckets) + pieces + 2


def check(
    bundle: BundleFiles,
    folder: Path,
    fail_above: float | None = None,
    on_unit: Callable[[], None] | None = None,
    backend: BackendName = "onnxruntime",
) -> CheckReport:
    """Compare a bundle's graphs with PyTorch's outputs, with each other, and run the whole loop.

    Args:
        bundle: opened, hence verified.
        folder: receives `check.json` and all arrays in polygraphy's format.
        fail_above: largest relative error of the last latent against full precision; None for no limit.
        on_unit: called `work_units` times.
        backend: of a GPU, whose plans are compared with the cpu graphs beside all that; others add nothing.

    Raises:
        DamagedFileError: the bundle lacks a reference or a graph.
        OutputError: the folder cannot be written.
        UserError: the backend does not run the bundle here.
    """
    rows: list[CheckRow] = []
    with Bundle(bundle, backend) as runnable:
        plans = runnable if runnable.choice.plans else None
        for unit in _units(bundle, folder, plans):
            rows += unit
            if on_unit is not None:
                on_unit()
        exact, loop = check_exactly(bundle), check_loop(bundle, folder, fail_above)
        plan_loop = None if plans is None else check_loop(bundle, folder, fail_above, plans)
    if on_unit is not None:
        on_unit()
        on_unit()
    loops = [own.passed for own in (loop, plan_loop) if own is not None]
    report = CheckReport(
        model=bundle.manifest.model,
        manifest_sha256=_identity(bundle),
        passed=all(loops) and all(row.passed for row in rows) and all(row.passed for row in exact),
        buckets=tuple((bucket.first, bucket.last) for bucket in bundle.policy.buckets),
        rows=tuple(sorted(rows, key=lambda row: (row.bucket, row.variant))),
        exact=exact,
        loop=loop,
        backend=None if plans is None else plans.choice.name,
        plan_loop=plan_loop,
    )
    write_report(folder, report)
    return report


def passed_before(
    bundle: BundleFiles, folder: Path, fail_above: float | None = None, backend: BackendName = "onnxruntime"
) -> CheckReport | None:
    """The report of an earlier check of this very bundle with this limit, if all its rows passed.

    Args:
        bundle: opened, hence verified: equal manifests mean equal files.
        folder: place of an earlier report, if there is one.
        fail_above: as in `check`.
        backend: likewise; plans that were not run then are run now.
    """
    try:
        report = read_json_model(folder / REPORT_NAME, CheckReport)
    except UserError:  # none, or damaged, or of another version: check again
        return None
    same = report.manifest_sha256 == _identity(bundle) and report.loop.fail_above == fail_above
    choice = choose(bundle.manifest, backend)
    ran = not choice.plans or report.backend == choice.name
    return report if report.passed and same and ran else None


def _identity(bundle: BundleFiles) -> str:
    return sha256(bundle.folder / MANIFEST_NAME)


def _targets(bundle: BundleFiles) -> Sequence[int]:
    """Assignments that have a target graph."""
    graphs = [graph.assignment for graph in bundle.index.graphs if graph.variant == "target"]
    if graphs == [None]:  # layout `plugin`: one graph for all
        return range(len(bundle.policy.assignments))
    return [assignment for assignment in graphs if assignment is not None]


def _units(bundle: BundleFiles, folder: Path, plans: Bundle | None) -> Iterator[list[CheckRow]]:
    reference = Reference(bundle)
    for assignment in range(len(bundle.policy.assignments)):
        yield from _check_steps(bundle, reference, assignment, folder, plans)
    for expert in bundle.experts:
        yield from _run_outputs(bundle, "reference", bundle.steps_of(expert), folder)
    for assignment in _targets(bundle):
        yield from _check_target(bundle, reference, assignment, folder, plans)


def _check_steps(
    bundle: BundleFiles, reference: Reference, assignment: int, folder: Path, plans: Bundle | None
) -> Iterator[list[CheckRow]]:
    """Every layer at the first step of every bucket of an assignment, and the output of its every step."""
    policy = bundle.policy
    firsts = [bucket.first for bucket in policy.buckets if bucket.assignment == assignment]
    steps = [step for step, used in enumerate(policy.step_assignments) if used == assignment]
    yield from _run_layers(bundle, {step: reference.layers(step) for step in firsts}, folder)
    yield from _run_outputs(bundle, "cpu", steps, folder, plans)


def check_layers(bundle: BundleFiles, step: int, expected: Arrays, folder: Path) -> list[CheckRow]:
    """All layers of a step's cpu graph, each by itself, in the order of execution.

    Args:
        bundle: opened.
        step: index in the loop.
        expected: module path → PyTorch's output of the layer, for evenly spaced rows of the step's inputs.
        folder: the report's.
    """
    return next(_run_layers(bundle, {step: expected}, folder))


def _run_layers(bundle: BundleFiles, steps: Mapping[int, Arrays], folder: Path) -> Iterator[list[CheckRow]]:
    """Run the layers of an assignment's cpu graph, each on PyTorch's outputs of the layers before it.

    Args:
        bundle: opened.
        steps: step → module path → PyTorch's output.
        folder: the report's.
    """
    reference, first = Reference(bundle), next(iter(steps))
    graph = bundle.cpu_graph(first)
    path, output = bundle.graph_path(graph), graph.outputs[0].name
    separated = folder / f"assignment_{bundle.policy.step_assignments[first]:03d}.layers.onnx"
    feeds = [_layer_feed(reference, step, layers) for step, layers in steps.items()]
    names = {f"{layer}{OUTPUT_SUFFIX}": layer for layer in bundle.policy.formats_at(first)}
    failure, results = None, [dict[str, np.ndarray]() for _ in feeds]
    try:
        names = _in_order(path, names)
        write_separated(path, steps[first], output, separated)
        results = run_in_onnxruntime(separated, feeds)
    except UserError:
        raise
    except AdatsqError as error:
        failure = str(error)
    for (step, layers), feed, got in zip(steps.items(), feeds, results, strict=True):
        rows = len(next(iter(layers.values())))
        chosen = chosen_outputs(layers)
        expected = {value: chosen[value] for value in names} | {output: reference.output(step, rows)}
        limits = {value: _layer_tolerance(reference, step, layer, chosen[value]) for value, layer in names.items()}
        tolerances = limits | {output: FLOAT32}
        run = _Comparison(
            bundle, _subject(bundle, step, separated=True), folder, f"step_{step:03d}.layers", separated, tolerances
        )
        if failure is not None:
            yield [replace(run, graph=path).failed(feed, expected, failure)]
        else:
            yield run.rows(feed, {value: got[value] for value in expected if value in got}, expected, marked=True)


def _layer_feed(reference: Reference, step: int, layers: Arrays) -> Arrays:
    """Inputs of a separated graph."""
    return {**reference.feed(step, len(next(iter(layers.values())))), **given_inputs(layers)}


def _layer_tolerance(reference: Reference, step: int, layer: str, rows: np.ndarray) -> Tolerance:
    fmt = reference.bundle.policy.formats_at(step)[layer]
    return layer_tolerance(fmt.activation, len(rows), reference.in_features(layer))


def _run_outputs(
    bundle: BundleFiles, variant: Variant, steps: Sequence[int], folder: Path, plans: Bundle | None = None
) -> Iterator[list[CheckRow]]:
    """Run a whole graph, an assignment's or the full-precision one, at its every step, with one session.

    The step's plan is compared with the output of its cpu graph, where plans run here.
    """
    reference, whole = Reference(bundle), variant == "reference"
    graph = bundle.graph(variant, None, bundle.expert(steps[0])) if whole else bundle.cpu_graph(steps[0])
    path, output = bundle.graph_path(graph), graph.outputs[0].name
    feeds = [reference.feed(step, graph=graph) for step in steps]
    failure, results = None, [dict[str, np.ndarray]() for _ in feeds]
    try:
        results = run_in_onnxruntime(path, feeds)
    except AdatsqError as error:
        failure = str(error)
    for step, feed, got in zip(steps, feeds, results, strict=True):
        expected = reference.full_precision(step) if whole else reference.output(step)
        limit = FLOAT32 if whole else _output_tolerance(reference, step)
        name = f"step_{step:03d}.full_precision" if whole else f"step_{step:03d}"
        run = _Comparison(bundle, _subject(bundle, step, variant), folder, name, path, {output: limit})
        if failure is not None:
            yield [run.failed(feed, {output: expected}, failure)]
        else:
            rows = run.rows(feed, got, {output: expected}, marked=False)
            yield rows if plans is None else [*rows, _check_plan(plans, step, feed, got, folder)]


def _check_plan(plans: Bundle, step: int, feed: Arrays, cpu: Arrays, folder: Path) -> CheckRow:
    """Compare the output of a step's plan with the cpu graph's."""
    bundle = plans.files
    rows = min(filter(None, (plans.most_rows(None), len(next(iter(feed.values()))))))
    inputs = {signature.name: feed[signature.name][:rows] for signature in bundle.row_inputs()}
    ((output, whole),) = cpu.items()
    expected, limit = {output: whole[:rows]}, plan_output_tolerance(bundle, step)
    graph = bundle.graph_path(bundle.cpu_graph(step))
    subject, name = _subject(bundle, step, "plan"), f"step_{step:03d}.plan"
    comparison = _Comparison(bundle, subject, folder, name, graph, {output: limit}, plans.choice.name)
    try:
        got = {output: plans.predict(step, inputs)}
    except AdatsqError as error:
        return comparison.failed(inputs, expected, str(error))
    (row,) = comparison.rows(inputs, got, expected, marked=False)
    command = SavedArrays(folder, name).compare_command(expected, {output: limit})
    return row.model_copy(update={"command": command})


def _output_tolerance(reference: Reference, step: int) -> Tolerance:
    policy = reference.bundle.policy
    return output_tolerance(list(policy.rows[policy.step_assignments[step]].values()), reference.output_spread(step))


def _subject(bundle: BundleFiles, step: int, variant: Variant = "cpu", separated: bool = False) -> Subject:
    return Subject(_bucket(bundle, step), step, bundle.policy.step_assignments[step], variant, separated=separated)


def _in_order(graph: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Value → layer, in the order in which the graph computes them.

    Raises:
        AdatsqError: the file is not an ONNX graph, or a layer's output is not in it.
    """
    place = {name: index for index, node in enumerate(load_graph(graph).graph.node) for name in node.output}
    missing = [value for value in names if value not in place]
    if missing:
        raise AdatsqError(f"'{graph}' computes no '{missing[0]}'; run 'adatsq-trt build engine' again")
    return {value: names[value] for value in sorted(names, key=place.__getitem__)}


def _check_target(
    bundle: BundleFiles, reference: Reference, assignment: int, folder: Path, plans: Bundle | None
) -> Iterator[list[CheckRow]]:
    """All pieces of a target graph, at the assignment's first step, for one row of each guidance branch.

    The blocks of a plan of that graph follow on those of the graph, where such plans run here.
    """
    step = bundle.policy.step_assignments.index(assignment)
    pair = BlockPair(bundle, assignment, reference.feed(step, rows=2))
    try:
        outside = pair.outside
    except UserError:
        raise
    except AdatsqError:  # the blocks' rows say why
        outside = []
    yield [row for name in outside for row in _check_piece(pair, step, name, folder)]
    marked = None if plans is None else run_marked(pair, step, plans.choice)
    for block in pair.blocks:
        rows = _check_piece(pair, step, block, folder)
        yield rows if marked is None else [*rows, *_check_plan_block(pair, step, block, folder, marked)]


def _check_plan_block(pair: BlockPair, step: int, block: str, folder: Path, marked: MarkedRun) -> list[CheckRow]:
    """Compare what a plan makes of a block's inputs with what the cpu block makes of the same."""
    bundle, assignment = pair.bundle, pair.assignment
    subject = Subject(_bucket(bundle, step), step, assignment, "plan", block)
    name = f"assignment_{assignment:03d}.plan.{_file_name(block)}"
    path = folder / f"{name}.onnx"
    comparison = _Comparison(bundle, subject, folder, name, path, {_NO_OUTPUT: FLOAT32}, marked.backend)
    if marked.failure is not None:
        return [comparison.failed({}, {}, marked.failure)]
    try:
        run = pair.continue_from(block, path, marked.values)
    except AdatsqError as error:
        return [comparison.failed({}, {}, str(error))]
    limits = {name: _target_tolerance(bundle, assignment, block, layers) for name, layers in run.layers.items()}
    rows = replace(comparison, tolerances=limits).rows(run.inputs, run.got, run.expected, marked=True)
    command = SavedArrays(folder, name).compare_command(run.expected, limits)
    return [row.model_copy(update={"command": command}) for row in rows]


def _check_piece(pair: BlockPair, step: int, piece: str, folder: Path) -> list[CheckRow]:
    bundle, assignment = pair.bundle, pair.assignment
    subject = Subject(_bucket(bundle, step), step, assignment, "target", piece)
    name = f"assignment_{assignment:03d}.{_file_name(piece)}"
    path = folder / f"{name}.onnx"
    comparison = _Comparison(bundle, subject, folder, name, path, {_NO_OUTPUT: FLOAT32})
    try:
        run = pair.run(piece, path)
    except UserError:
        raise
    except AdatsqError as error:
        return [comparison.failed({}, {}, str(error))]
    limits = {name: _target_tolerance(bundle, assignment, piece, layers) for name, layers in run.layers.items()}
    rows = replace(comparison, tolerances=limits).rows(run.inputs, run.got, run.expected, marked=True)
    written = written_formats(bundle, "target", step)
    return [_with_written_format(row, written) for row in rows]


def _file_name(module: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", module)[:_LONGEST_NAME]


def _target_tolerance(bundle: BundleFiles, assignment: int, piece: str, layers: int) -> Tolerance:
    base_type = bundle.index.base_type
    if not layers and piece not in bundle.index.blocks:
        return unquantized_tolerance(base_type)
    return block_tolerance(list(bundle.policy.rows[assignment].values()), base_type, layers)


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
    """One run of a graph, to be compared.

    Attributes:
        bundle: opened.
        subject: its place in the bundle.
        folder: the report's.
        name: beginning of the names of the saved arrays.
        graph: ONNX file that ONNX Runtime ran.
        tolerances: output → its limits.
        backend: name of the backend that ran a plan.
    """

    bundle: BundleFiles
    subject: Subject
    folder: Path
    name: str
    graph: Path
    tolerances: Mapping[str, Tolerance]
    backend: str = ""

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
        figures = compare(got, expected, self.tolerances)
        return [
            self._row(
                output=output,
                median=figures[output].median,
                relative=figures[output].relative,
                passed=figures[output].passed,
                failure=None,
                command=saved.run_command(self.graph, output, marked, value, self.tolerances[output]),
            )
            for output, value in expected.items()
        ]

    def failed(self, inputs: Arrays, expected: Arrays, failure: str) -> CheckRow:
        """The row of a graph that does not run; its command fails in the same way."""
        saved = SavedArrays(self.folder, self.name)
        saved.save(inputs, {}, expected, *self._names)
        output, value = next(iter(expected.items()), (_NO_OUTPUT, np.zeros(1, np.float32)))
        command = saved.run_command(self.graph, output, False, value, self.tolerances[output])
        row = self._row(output=output, median=None, relative=None, passed=False, failure=failure, command=command)
        return row.model_copy(update={"layer": None, "format": None, "separated": False})  # it is about the graph

    @property
    def _names(self) -> tuple[str, str]:
        """Names of the two computations."""
        if self.subject.variant == "plan":
            return self.backend, CPU_NAME
        # A target block is the reference of its cpu twin for polygraphy, which runs the twin only.
        return CPU_NAME, REFERENCE_NAME if self.subject.variant == "target" else self._pytorch

    @property
    def _pytorch(self) -> str:
        return FULL_PRECISION_NAME if self.subject.variant == "reference" else PYTORCH_NAME

    def _row(
        self, output: str, median: float | None, relative: float | None, passed: bool, failure: str | None, command: str
    ) -> CheckRow:
        subject = self.subject
        computed_by, reference = {
            "target": (REFERENCE_NAME, f"the cpu graph in {CPU_NAME}"),
            "plan": (self.backend, f"the cpu graph in {CPU_NAME}"),
        }.get(subject.variant, (CPU_NAME, self._pytorch))
        formats: Mapping[str, str] = self.bundle.policy.rows[subject.assignment]
        layer = output.removesuffix(OUTPUT_SUFFIX).removesuffix(BRANCH_SUFFIX)
        tolerance = self.tolerances[output]
        return CheckRow(
            bucket=subject.bucket,
            step=subject.step,
            assignment=subject.assignment,
            variant=subject.variant,
            block=subject.block,
            separated=subject.separated,
            layer=layer if layer in formats else None,
            format=formats.get(layer),
            computed_by=computed_by,
            reference=reference,
            median_error=median,
            median_tolerance=tolerance.median,
            relative_error=relative,
            relative_tolerance=tolerance.relative,
            passed=passed,
            failure=failure,
            command=command,
        )

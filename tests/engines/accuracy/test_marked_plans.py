"""Plans compared block by block: the real compiler takes their marked graphs, and a double of a GPU runs them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from adatsq_trt.engines import accuracy
from adatsq_trt.engines.accuracy import CheckReport, CheckRow, marked_plans
from adatsq_trt.engines.accuracy.blocks import BlockPair
from adatsq_trt.engines.accuracy.marked_plans import border_names, build_marked_plan, write_marked
from adatsq_trt.engines.accuracy.tolerances import block_tolerance
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.backends.rtx_steps import MarkedSteps
from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.errors import AdatsqError
from tests.doubles.gpu import book, device, library
from tests.doubles.tensorrt_on_onnxruntime import Library, PlanBook
from tests.engines.conftest import ASSIGNMENTS, LAYERS
from tests.engines.gpu_runtime.conftest import planned
from tests.tiny_pipeline import make_flux_bundle

__all__ = ["book", "device", "library", "planned"]
BLOCKS = ("blocks.0", "blocks.1")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[Path, int], bytes]:
    """Plans of the real compiler by bundle and assignment."""
    return {}


@pytest.fixture
def marked(
    compiled: dict[tuple[Path, int], bytes], book: PlanBook, library: Library, monkeypatch: pytest.MonkeyPatch
) -> list[bytes]:
    """Marked plans are the real compiler's, and known to the double."""
    plans: list[bytes] = []

    def build(pair: BlockPair, names: tuple[str, ...], target: str, rows: int) -> bytes:
        key = (pair.bundle.folder, pair.assignment)
        if key not in compiled:
            compiled[key] = build_marked_plan(pair, names, target, rows)
            book.enter_marked(pair.bundle, compiled[key], pair.assignment, pair.declared(names), rows)
        plans.append(compiled[key])
        return compiled[key]

    monkeypatch.setattr(marked_plans, "build_marked_plan", build)
    return plans


def of_blocks(report: CheckReport) -> list[CheckRow]:
    return [row for row in report.rows if row.variant == "plan" and row.block is not None]


def failed_blocks(report: CheckReport) -> set[str | None]:
    return {row.block for row in of_blocks(report) if not row.passed}


@pytest.mark.parametrize("layout", ["embedded", "shared"])
def test_every_block_of_every_assignment(
    planned: Callable[[Layout], Path], library: Library, marked: list[bytes], tmp_path: Path, layout: Layout
) -> None:
    files = BundleFiles.open(planned(layout))
    report = accuracy.check(files, tmp_path, backend="rtx")
    rows = of_blocks(report)
    assert [(row.assignment, row.block) for row in sorted(rows, key=lambda row: (row.assignment, str(row.block)))] == [
        (assignment, block) for assignment in range(len(ASSIGNMENTS)) for block in BLOCKS
    ]
    for row in rows:
        limit = block_tolerance(ASSIGNMENTS[row.assignment], "bfloat16", 1)
        assert (row.relative_tolerance, row.median_tolerance) == (limit.relative, limit.median)
        assert row.relative_error is not None
        assert 0 < row.relative_error < row.relative_tolerance
        assert (row.computed_by, row.reference) == ("rtx", "the cpu graph in onnxruntime")
        assert "polygraphy run --load-outputs" in row.command
    assert report.passed
    assert len(marked) == len(ASSIGNMENTS)


def test_where_plans_are_not_of_these_graphs(
    planned: Callable[[Layout], Path], library: Library, marked: list[bytes], tmp_path: Path
) -> None:
    report = accuracy.check(BundleFiles.open(planned("switch")), tmp_path, backend="rtx")
    assert report.passed
    assert not of_blocks(report)
    assert not marked


@pytest.mark.parametrize("layer", LAYERS)
def test_a_wrong_scale_names_its_block(
    layer: str,
    planned: Callable[[Layout], Path],
    library: Library,
    marked: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slice of the table that holds another number than the layer's scale."""
    bind, kept = EngineContext.bind, []

    def wrong(self: EngineContext, name: str, address: int) -> None:
        if name == f"{layer}.scale":
            block = library.device.empty((), self.dtype(name)).fill_(1 / 512)
            kept.append(block)
            address = block.data_ptr()
        bind(self, name, address)

    monkeypatch.setattr(EngineContext, "bind", wrong)
    report = accuracy.check(BundleFiles.open(planned("embedded")), tmp_path, backend="rtx")
    assert failed_blocks(report) == {layer.rpartition(".")[0]}
    assert not report.passed
    searched = accuracy.bisect(BundleFiles.open(planned("embedded")), report, tmp_path)
    assert searched.first_layers == (), "of a plan no layer is known"


def test_a_wrong_weight_names_its_block(
    planned: Callable[[Layout], Path],
    library: Library,
    marked: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the plan of the second block had been compiled of other numbers."""
    values = MarkedSteps.values

    def spoilt(self: MarkedSteps, step: int, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = values(self, step, inputs)
        return {name: 1.5 * value if name == "velocity" else value for name, value in found.items()}

    monkeypatch.setattr(MarkedSteps, "values", spoilt)
    report = accuracy.check(BundleFiles.open(planned("embedded")), tmp_path, backend="rtx")
    assert failed_blocks(report) == {"blocks.1"}


def test_a_compiler_that_refuses_is_told(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise AdatsqError("TensorRT-RTX cannot compile it")

    monkeypatch.setattr(marked_plans, "build_marked_plan", refuse)
    report = accuracy.check(BundleFiles.open(planned("embedded")), tmp_path, backend="rtx")
    assert failed_blocks(report) == set(BLOCKS)
    assert {row.failure for row in of_blocks(report)} == {"TensorRT-RTX cannot compile it"}


def test_the_compiler_takes_the_marked_graph_of_a_real_model(tmp_path: Path) -> None:
    files = make_flux_bundle(tmp_path / "bundle", ("target", "cpu"))
    graph = files.graph("cpu", 0)
    feed = {s.name: np.zeros((2, *map(int, s.shape[1:])), np.float32) for s in graph.inputs}
    pair = BlockPair(files, 0, {**feed, **{s.name: np.ones((), np.float32) for s in graph.scale_inputs.values()}})
    names = border_names(pair)
    (tmp_path / "marked").mkdir()
    path = files.graph_path(files.graph("target", 0))
    model = onnx.load(write_marked(files, path, pair.declared(names), tmp_path / "marked"), load_external_data=False)
    assert [value.name for value in model.graph.output] == ["velocity", *names]
    kinds = {value.type.tensor_type.elem_type for value in model.graph.output}
    assert kinds <= {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT}
    produced = {name for node in model.graph.node for name in node.output}
    assert produced.issuperset(names)
    assert build_marked_plan(pair, names, "sm120", 2)

"""What layouts weigh, counted by hand on the tiny bundle."""

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest

from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, Layout, write_manifest
from adatsq_trt.engines.plan_weights import initializers
from adatsq_trt.engines.sizes import constant_bytes, size_report
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.formats import TARGETS
from tests.engines.conftest import ASSIGNMENTS, WIDTH

_BITS = {"fp8": 8, "w8a8s": 8, "bf16": 16}


def weights(row: tuple[str, ...]) -> int:
    return sum(WIDTH * WIDTH * _BITS[name] // 8 for name in row)


def test_weights_of_each_layout(tiny_bundle: BundleFiles) -> None:
    report = size_report(tiny_bundle)
    assert report is not None
    rows = {row.layout: row for row in report.layouts}
    graphs = [tiny_bundle.graph_path(tiny_bundle.graph("target", i)) for i in range(len(ASSIGNMENTS))]
    rest = [constant_bytes(path) - weights(row) for path, row in zip(graphs, ASSIGNMENTS, strict=True)]
    assert all(100 < size < 300 for size in rest)  # two biases and up to two scale vectors of 16 numbers in 16 bits
    assert rows["embedded"].weight_bytes == sum(map(weights, ASSIGNMENTS)) + sum(rest)
    once = sum(weights(tuple(column)) for column in (dict.fromkeys(c) for c in zip(*ASSIGNMENTS, strict=True)))
    assert once < report.floor_bytes < once + 600
    assert rows["shared"].weight_bytes == rows["switch"].weight_bytes == report.floor_bytes
    assert [row.engines for row in report.layouts] == [3, 3, 1]
    columns = [set(column) for column in zip(*ASSIGNMENTS, strict=True)]
    assert rows["switch"].branches == sum(len(column) for column in columns if len(column) > 1) > 0
    assert rows["embedded"].branches == rows["shared"].branches == 0
    assert all(row.plan_overhead_bytes == {} for row in report.layouts if row.layout != "embedded")


def test_overhead_is_what_plans_hold_beside_weights(own_bundle: BundleFiles) -> None:
    layout: Layout
    for layout in ("embedded", "shared", "switch"):
        plans = build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 8, layout=layout)
        manifest = own_bundle.manifest.model_copy(update={"plans": plans, "layout": layout})
        write_manifest(own_bundle.folder, manifest)
        report = size_report(BundleFiles.open(own_bundle.folder))
        assert report is not None
        row = next(row for row in report.layouts if row.layout == layout)
        inside = 0 if layout == "shared" else row.weight_bytes
        whole = sum((own_bundle.folder / plan.path).stat().st_size for plan in plans)
        assert row.plan_bytes == {"sm120": whole}
        assert row.plan_overhead_bytes == {"sm120": whole - inside}
        assert [other.plan_bytes for other in report.layouts if other is not row] == [{}, {}]


def test_a_bundle_without_target_graphs_has_no_report(own_bundle: BundleFiles) -> None:
    graphs = tuple(graph for graph in own_bundle.index.graphs if graph.variant != "target")
    index = own_bundle.index.model_copy(update={"graphs": graphs})
    assert size_report(BundleFiles(own_bundle.folder, own_bundle.manifest, own_bundle.policy, index)) is None


def negative_offset(content: bytes) -> bytes:
    model = onnx.ModelProto.FromString(content)
    for tensor in initializers(model.graph):
        for entry in tensor.external_data:
            entry.value = "-5" if entry.key == "offset" else entry.value
    return model.SerializeToString()


def without_length(content: bytes) -> bytes:
    return content.replace(b"length", b"LENGTH")


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")
@pytest.mark.parametrize(
    ("damage", "message"),
    [(negative_offset, "got -5"), (without_length, "has no length"), (lambda _: b"\xff" * 9, "not a sound ONNX graph")],
)
def test_graphs_that_say_nonsense(own_bundle: BundleFiles, damage: Callable[[bytes], bytes], message: str) -> None:
    path = own_bundle.graph_path(own_bundle.graph("target", None))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=message):
        size_report(own_bundle)


def test_a_bundle_without_the_graph_of_all_assignments(own_bundle: BundleFiles) -> None:
    graphs = tuple(graph for graph in own_bundle.index.graphs if graph.assignment is not None)
    index = own_bundle.index.model_copy(update={"graphs": graphs})
    with pytest.raises(DamagedFileError, match="has no target graph for assignment None"):
        size_report(replace(own_bundle, index=index))

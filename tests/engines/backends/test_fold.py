"""Constants that are computed before loading: the same numbers, less memory, nothing left behind."""

import errno
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from adatsq_trt.engines.backends import fold as module
from adatsq_trt.engines.backends import onnxruntime as backend
from adatsq_trt.engines.backends.fold import DATA_NAME, fold, weight_file_bytes
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.errors import DamagedFileError

K, N = 64, 48


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A choice between an e4m3 and an int8 weight; both have scales, the first is widened outside of its branch."""
    rng = np.random.default_rng(0)
    codes = numpy_helper.from_array(rng.integers(-8, 8, (N, K)).astype(np.float32), "codes")
    eight = helper.make_tensor("e4m3", TensorProto.FLOAT8E4M3FN, [N, K], numpy_helper.to_array(codes).ravel())
    constants = [
        eight,
        numpy_helper.from_array(rng.random((N, 1), dtype=np.float32), "scale"),
        numpy_helper.from_array(rng.integers(-127, 127, (K, N)).astype(np.int8), "int8"),
        numpy_helper.from_array(rng.random(N, dtype=np.float32), "int8_scale"),
        numpy_helper.from_array(rng.random(N, dtype=np.float32), "bias"),
        numpy_helper.from_array(np.float32(1 / 64), "step"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])]
    integer = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "step", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["int8", "int8_scale"], ["d"], axis=1),
        helper.make_node("MatMul", ["xd", "d"], ["q"]),
    ]
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["p"])], "a", [], [onnx.ValueInfoProto(name="p")]),
        helper.make_graph(integer, "b", [], [onnx.ValueInfoProto(name="q")]),
    ]
    nodes = [
        helper.make_node("Cast", ["e4m3"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["w"], perm=[1, 0]),
        helper.make_node("If", ["first"], ["product"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K]),
        helper.make_tensor_value_info("first", TensorProto.BOOL, []),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "choice", inputs, output, constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "graph.onnx", save_as_external_data=True, location="weights.data", size_threshold=512)
    return tmp_path / "graph.onnx"


@pytest.fixture
def always_folded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Fold graphs of any size, in a folder that is empty before and after."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(backend, "_FOLDED_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield scratch
    assert list(scratch.iterdir()) == []


def outputs(path: Path) -> list[np.ndarray]:
    x = np.random.default_rng(1).random((3, K), dtype=np.float32)
    with OnnxRuntimeBackend().load(path) as runner:
        return [runner.run({"x": x, "first": np.array(first)})["y"] for first in (True, False)]


def test_it_computes_the_same(graph: Path, always_folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = outputs(graph)
    monkeypatch.setattr(backend, "_FOLDED_BYTES", 1 << 24)
    for got, wanted in zip(folded, outputs(graph), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_only_what_depends_on_inputs_is_left(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    model = onnx.load(fold(graph, tmp_path / "new"), load_external_data=False)
    assert [node.op_type for node in model.graph.node] == ["If", "Add"]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    # What the branch dequantizes itself stays in int8, for its product to be fused with it.
    assert {name: tensor.data_type for name, tensor in tensors.items()} == {
        "w": TensorProto.FLOAT,
        "int8": TensorProto.INT8,
        "int8_scale": TensorProto.FLOAT,
        "bias": TensorProto.FLOAT,
        "step": TensorProto.FLOAT,
        "zero": TensorProto.INT8,
    }
    assert {name for name, tensor in tensors.items() if uses_external_data(tensor)} == {"w", "int8"}
    assert weight_file_bytes(tmp_path / "new" / "folded.onnx") == (tmp_path / "new" / DATA_NAME).stat().st_size


def test_small_graphs_are_loaded_as_they_are(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fold", None)
    assert len(outputs(graph)) == 2


def test_without_room_on_the_disk_it_loads_as_before(
    graph: Path, always_folded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(_path: Path, _folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "fold", no_room)
    with caplog.at_level(logging.WARNING):
        assert len(outputs(graph)) == 2
    assert "no room for the weights" in caplog.text


def test_a_weight_file_that_is_too_short(graph: Path, always_folded: Path) -> None:
    file = graph.with_name("weights.data")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match="cannot load"):
        OnnxRuntimeBackend().load(graph)

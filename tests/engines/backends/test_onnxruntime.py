"""ONNX Runtime on the CPU."""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError

K, N = 64, 8


def write_int8_product(path: Path) -> None:
    """QuantizeLinear → DequantizeLinear → MatMul with an int8 weight: the pattern that ONNX Runtime fuses."""
    weight = np.full((K, N), 127, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.full(N, 0.5, np.float32), "ws"),
        numpy_helper.from_array(np.int8(0), "z"),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])],
        constants,
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )


def test_int8_products_do_not_saturate(tmp_path: Path) -> None:
    """127 * 127 * 64 fits in 32 bits; pairs of unsigned-by-signed products do not fit in 16."""
    write_int8_product(tmp_path / "graph.onnx")
    x = np.full((2, K), 127, np.float32)
    with OnnxRuntimeBackend().load(tmp_path / "graph.onnx") as runner:
        outputs = runner.run({"x": x, "s": np.array(1, np.float32)})
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], np.full((2, N), 127 * 127 * K * 0.5, np.float32))


def test_a_session_that_rests_leaves_the_processors_to_others(tmp_path: Path) -> None:
    """ONNX Runtime's threads would spin for tens of milliseconds after each call, beside another session's call."""
    weight = numpy_helper.from_array(np.ones((1024, 1024), np.float32), "w")
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [256, 1024]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "wide", sides[:1], sides[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    x, spent = np.ones((256, 1024), np.float32), []
    with OnnxRuntimeBackend().load(tmp_path / "graph.onnx") as runner:
        for _ in range(9):
            runner.run({"x": x})
            before = time.process_time()
            time.sleep(0.1)
            spent.append(time.process_time() - before)
    assert statistics.median(spent) < 0.004


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(DamagedFileError, match=r"cannot load .*graph\.onnx"):
        OnnxRuntimeBackend().load(tmp_path / "graph.onnx")


def test_the_library_is_not_shadowed() -> None:
    assert OnnxRuntimeBackend().version() == onnxruntime.__version__
    OnnxRuntimeBackend().require()


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="pip install onnxruntime-gpu"):
        OnnxRuntimeBackend().require()


def test_a_build_without_the_cpu_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["Other"])
    with pytest.raises(DependencyError, match="only Other"):
        OnnxRuntimeBackend().require()


def test_inputs_that_the_graph_does_not_take(tmp_path: Path) -> None:
    write_int8_product(tmp_path / "g.onnx")
    runner = OnnxRuntimeBackend().load(tmp_path / "g.onnx")
    with pytest.raises(AdatsqError, match=r"cannot run '.*g\.onnx' with inputs \['other'\]: .*adatsq-trt check"):
        runner.run({"other": np.zeros((1, K), np.float32)})

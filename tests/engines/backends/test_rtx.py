"""TensorRT-RTX without a GPU: what it compiles, and how it says no."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.errors import AdatsqError, DependencyError, UserError
from adatsq_trt.formats import TARGETS

BATCH = BatchRange(1, 4, 8)


def write(path: Path, *nodes: onnx.NodeProto) -> Path:
    """A graph x → y of float32 with a dynamic batch and a scalar input."""
    graph = helper.make_graph(
        list(nodes),
        "probe",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())
    return path


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
def test_compiles_for_every_gpu_target(tmp_path: Path, target: str) -> None:
    path = write(tmp_path / "graph.onnx", helper.make_node("Mul", ["x", "scale"], ["y"]))
    assert len(RtxBackend().build(path, TARGETS[target], BATCH)) > 1000


def test_the_batch_range_goes_into_the_plan(tmp_path: Path) -> None:
    path = write(tmp_path / "graph.onnx", helper.make_node("Mul", ["x", "scale"], ["y"]))
    small, large = (RtxBackend().build(path, TARGETS["sm120"], BatchRange(1, n, n)) for n in (2, 64))
    assert small != large


def test_every_batch_has_an_optimization_profile(tmp_path: Path) -> None:
    path = write(tmp_path / "graph.onnx", helper.make_node("Mul", ["x", "scale"], ["y"]))
    batch = BatchRange(1, 64, 64, smaller=(2, 16))
    assert batch.profiles == (Profile(1, 2, 2), Profile(1, 16, 16), Profile(1, 64, 64))
    assert RtxBackend().build(path, TARGETS["sm120"], batch) != RtxBackend().build(path, TARGETS["sm120"], BATCH)


def test_the_parsers_words_reach_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "graph.onnx", helper.make_node("NoSuchOperator", ["x"], ["y"], name="odd"))
    with pytest.raises(AdatsqError, match=r"cannot read .*sm120.*'odd' \(NoSuchOperator\)"):
        RtxBackend().build(path, TARGETS["sm120"], BATCH)


def test_the_compilers_words_reach_the_user(tmp_path: Path) -> None:
    """A batch range that the graph cannot take: found by the builder, not by the parser."""
    path = write(tmp_path / "graph.onnx", helper.make_node("Mul", ["x", "scale"], ["y"]))
    with pytest.raises(AdatsqError, match=r"cannot compile .*sm120.*: (?!it gives no reason)"):
        RtxBackend().build(path, TARGETS["sm120"], BatchRange(4, 2, 1))


def test_the_cpu_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sm80, sm86, sm89, sm120"):
        RtxBackend().build(tmp_path / "graph.onnx", TARGETS["cpu"], BATCH)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(DependencyError, match="pip install tensorrt-rtx"):
        RtxBackend().require()

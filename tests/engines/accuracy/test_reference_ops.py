"""The FP4 operator of onnx's evaluator against the grid that the policy was searched with."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from polygraphy.comparator import Comparator

from adatsq_trt.engines.accuracy.reference_ops import ReferenceRunner, TRT_FP4DynamicQuantize
from adatsq_trt.formats import FORMATS
from adatsq_trt.quantizers import fake_quantize_activation


def quantizer(width: int, scale: float, axis: int = -1) -> onnx.ModelProto:
    """x → TRT_FP4DynamicQuantize → DequantizeLinear twice → y, as target graphs have it."""
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["x", "g"], ["q", "s"], domain="trt",
            axis=axis, block_size=16, scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node("DequantizeLinear", ["s", "g"], ["wide"]),
        helper.make_node("DequantizeLinear", ["q", "wide"], ["y"], axis=-1, block_size=16),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "fp4",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor("g", TensorProto.FLOAT, [], [scale])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.floats(0.25, 8))
def test_fp4_agrees_with_fake_quantization(seed: int, size: float, headroom: float) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 48), dtype=np.float32) * np.float32(size)
    x[0, :16] = 0
    scale = np.float32(np.abs(x).max() * headroom / (6 * 448))
    (got,) = ReferenceEvaluator(quantizer(48, scale), new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})
    expected = fake_quantize_activation(torch.from_numpy(x), FORMATS["nvfp4"].activation, torch.tensor(scale))
    np.testing.assert_array_equal(got, expected.numpy())


def test_fp4_refuses_other_axes() -> None:
    evaluator = ReferenceEvaluator(quantizer(16, 1.0, axis=0), new_ops=[TRT_FP4DynamicQuantize])
    with pytest.raises(ValueError, match="last axis"):
        evaluator.run(None, {"x": np.ones((16, 16), np.float32)})


def test_the_runner_rounds_inputs_to_the_graphs_type() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "copy",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [None])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [None])],
    )
    runner = ReferenceRunner(helper.make_model(graph, ir_version=10), "reference")
    results = Comparator.run([runner], data_loader=[{"x": np.array([1.0, 1.0 + 2**-12], np.float32)}])
    output = results["reference"][0]["y"]
    assert output.dtype == np.float32
    assert output.tolist() == [1.0, 1.0]

"""Which INT8 product of ONNX Runtime is right on this processor.

On x86 its fast product of unsigned by signed bytes adds pairs in 16 bits, which saturate, unless the processor has the
VNNI instructions, which add in 32. The session option "session.x64quantprecision" asks for a product that is right
everywhere and about half as fast.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from adatsq_trt.engines.processor import processor

log = logging.getLogger(__name__)
PRECISE_PRODUCTS = "session.x64quantprecision"
_VNNI = {"avx512_vnni", "avx_vnni"}
# One row and many take different code, and so does what is left over from a whole tile.
_ROWS = (1, 67)
_INPUTS, _OUTPUTS = 260, 70


@cache
def precise_products_needed() -> bool:
    """Whether sessions have to ask for the slower product: no VNNI, or VNNI and wrong numbers all the same."""
    if not _VNNI & processor()[1]:
        return True
    if fast_products_are_right():
        return False
    log.warning("the processor lists VNNI, but INT8 products of ONNX Runtime saturate; taking the slower ones")
    return True


def fast_products_are_right() -> bool:
    """Compute products with ONNX Runtime, without the option, that come out wrong where 16 bits saturate."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    codes, weight = saturating_operands()
    session = onnxruntime.InferenceSession(_product(weight), options, providers=["CPUExecutionProvider"])
    wanted = codes.astype(np.int64) @ weight
    return all(
        np.array_equal(session.run(None, {"x": codes[:rows].astype(np.float32)})[0], wanted[:rows]) for rows in _ROWS
    )


def saturating_operands() -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [rows, inputs] and a weight int8 [inputs, outputs].

    Every product has neighbours whose sum needs more than 16 bits, and is exact in float32.
    """
    dice = np.random.default_rng(0)
    codes = dice.integers(96, 128, (max(_ROWS), _INPUTS), dtype=np.int8)
    signs = dice.choice(np.array([-1, 1], np.int8), (1, _OUTPUTS))
    return codes, dice.integers(96, 128, (_INPUTS, _OUTPUTS), dtype=np.int8) * signs


def _product(weight: np.ndarray) -> bytes:
    """A graph as the exporter writes it: x float32 [rows, inputs], scales of 1, y = x @ weight."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["wide"], axis=1),
        helper.make_node("MatMul", ["values", "wide"], ["y"]),
    ]
    constants = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "weight": weight,
        "ones": np.ones(weight.shape[1], np.float32),
        "zeros": np.zeros(weight.shape[1], np.int8),
    }
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())

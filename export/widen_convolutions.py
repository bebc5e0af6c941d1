"""Pass: convolutions of a bfloat16 graph compute in float32, since ONNX has none in bfloat16 before opset 22.

Rules:
    1. Conv in bfloat16: Cast to float32 before it, for the input, the kernel and the bias, and Cast back after it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.emitter import Emitter


class WidenConvolutions(ir.passes.InPlacePass):
    """Put casts around convolutions; see the rule above."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rule 1."""
        found = [node for node in model.graph if node.op_type == "Conv" and _is_bfloat16(node.outputs[0])]
        for node in found:
            _widen(node)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No convolution gives bfloat16."""
        for node in model.graph:
            if node.op_type == "Conv" and _is_bfloat16(node.outputs[0]):
                raise ir.passes.PostconditionError(f"convolution '{node.name}' still computes in bfloat16")


def _is_bfloat16(value: ir.Value) -> bool:
    return value.dtype is DataType.BFLOAT16


def _widen(node: ir.Node) -> None:
    """Rule 1."""
    result = node.outputs[0]
    emit = Emitter(node, f"{node.name}/")
    for index, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(index, emit.cast(f"CastInput{index}", value, DataType.FLOAT))
    users = list(result.uses())
    narrow = Emitter(node, f"{node.name}/", after=True).cast("CastOutput", result, DataType.BFLOAT16)
    narrow.shape = result.shape
    for user, index in users:
        user.replace_input_with(index, narrow)
    result.type = ir.TensorType(DataType.FLOAT)

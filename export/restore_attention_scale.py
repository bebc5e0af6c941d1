"""Pass: attention's scale, which a 16-bit trace rounds, becomes exact again on the way to float32.

The exporter writes softmax(q kᵀ / sqrt(d)) as MatMul(c q, c kᵀ) with the constant c = d^(-1/4) in the type of q. In
bfloat16 this shifts every logit by up to 0.4 % unless d is a power of 16.

Rules:
    1. A 16-bit scalar that only scales operands of a MatMul whose product goes to Softmax, with or without a mask
       added on the way, and that is d^(-1/4) rounded, where d is the last axis of one of those operands: becomes
       d^(-1/4) in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from adatsq_trt.export.emitter import SIXTEEN_BIT


class RestoreAttentionScale(ir.passes.InPlacePass):
    """Make rounded attention scales exact; to be followed by `LowerTypes`, which widens what they scale."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rule 1."""
        modified = False
        for value in model.graph.initializers.values():
            if value.dtype not in SIXTEEN_BIT or value.const_value is None or value.const_value.size != 1:
                continue
            products = [node for node, _ in value.uses()]
            if not products or not all(_scales_attention(node) for node in products):
                continue
            exact = _exact_scale(value.const_value.numpy(), products)
            if exact is not None:
                shape = value.const_value.shape.numpy()
                value.const_value = ir.tensor(np.full(shape, exact, np.float32))
                value.type = ir.TensorType(ir.DataType.FLOAT)
                modified = True
        return ir.passes.PassResult(model, modified)


def _scales_attention(node: ir.Node) -> bool:
    """Whether a node is a Mul → MatMul → Softmax, or one with an Add before the Softmax."""
    if node.op_type != "Mul":
        return False
    products = _users(node)
    return bool(products) and all(
        product.op_type == "MatMul" and any(map(_takes_logits, _users(product))) for product in products
    )


def _takes_logits(node: ir.Node) -> bool:
    """Whether a node is a Softmax, or an Add before one."""
    return node.op_type == "Softmax" or (
        node.op_type == "Add" and any(user.op_type == "Softmax" for user in _users(node))
    )


def _users(node: ir.Node) -> list[ir.Node]:
    """Of a node's output."""
    return [user for user, _ in node.outputs[0].uses()]


def _exact_scale(rounded: np.ndarray, products: list[ir.Node]) -> float | None:
    """d^(-1/4), if that is what was rounded."""
    for node in products:
        for operand in node.inputs:
            if operand is None or operand.shape is None or operand.shape.rank() < 2:
                continue
            width = operand.shape[-1]
            if isinstance(width, int) and rounded.dtype.type(width**-0.25) == rounded.reshape(-1)[0]:
                return float(width**-0.25)
    return None

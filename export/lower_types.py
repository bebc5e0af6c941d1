"""Pass: a graph in 16 bit becomes the same graph in float32, over the same stored bytes.

Rules:
    1. Large 16-bit initializers keep their bytes in the weight file and are read through one Cast to float32. Small
       ones, which live in the graph, are converted.
    2. 16-bit graph inputs, outputs and values become float32.
    3. A Cast to a 16-bit type, or to float32 from what was 16 bit, is left out: rounding that a layer's format asks for
       is put back by `lower_quantizers`.
    4. 16-bit tensors in attributes become float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import AttributeType, DataType

from adatsq_trt.export.emitter import SIXTEEN_BIT, Emitter

FLOAT = DataType.FLOAT


class LowerTypes(ir.passes.InPlacePass):
    """Turn bfloat16 and float16 into float32; see the rules above."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 4."""
        for value in list(model.graph.initializers.values()):
            if value.dtype in SIXTEEN_BIT:
                _widen_initializer(value)
        # A new type object each time: clones of a model share theirs.
        for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
            if value.dtype in SIXTEEN_BIT:
                value.type = ir.TensorType(FLOAT)
        for node in list(model.graph):
            _widen_attributes(node)
            if node.op_type == "Cast":
                _drop_cast(node)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Only stored bytes are 16 bit, and only Casts read them."""
        for node in model.graph:
            if any(value.dtype in SIXTEEN_BIT for value in node.outputs):
                raise ir.passes.PostconditionError(f"node '{node.name}' still gives a 16-bit value")
            if node.op_type != "Cast" and any(v is not None and v.dtype in SIXTEEN_BIT for v in node.inputs):
                raise ir.passes.PostconditionError(f"node '{node.name}' still reads a 16-bit value")


def _widen_initializer(value: ir.Value) -> None:
    """Rule 1."""
    content, users = value.const_value, [(user, index) for user, index in value.uses()]
    assert content is not None and value.name is not None
    if not isinstance(content, ir.ExternalTensor):
        value.const_value = ir.tensor(np.asarray(content.numpy(), np.float32))
        value.type = ir.TensorType(FLOAT)
        return
    if users:
        wide = Emitter(_first([user for user, _ in users]), f"{value.name}/").cast("Widen", value, FLOAT)
        wide.shape = value.shape
        for user, index in users:
            user.replace_input_with(index, wide)


def _first(nodes: list[ir.Node]) -> ir.Node:
    """The one that comes first in the graph."""
    graph = nodes[0].graph
    assert isinstance(graph, ir.Graph)
    for node in graph:
        if node in nodes:
            return node
    raise AssertionError("a user of a graph's value is in that graph")


def _drop_cast(node: ir.Node) -> None:
    """Rule 3."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None and node.graph is not None
    if result.dtype is not FLOAT:
        return
    if source.dtype is FLOAT and not result.is_graph_output():
        result.replace_all_uses_with(source)
        node.graph.remove(node, safe=True)
    else:
        node.attributes["to"] = ir.AttrInt64("to", FLOAT.value)


def _widen_attributes(node: ir.Node) -> None:
    """Rule 4."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == AttributeType.TENSOR and attribute.value.dtype in SIXTEEN_BIT:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(np.asarray(attribute.value.numpy(), np.float32)))

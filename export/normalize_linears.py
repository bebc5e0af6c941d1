"""Pass: every linear layer of a policy takes one form, whatever the exporter made of it.

The form is MatMul(x, Transpose(W)) [+ Add(bias)] with W named "<module path>.weight" and shaped [N, K] as in PyTorch.

Rules:
    1. MatMul with an anonymous weight [K, N], which the exporter transposed ahead: the weight is turned back.
    2. Gemm with transB: MatMul, and Add for the bias.
    3. The value that leaves the layer is named "<module path>.output".
    4. Nodes behind that value are none of the layer's: where the exporter wrote anew how a module splits what the layer
       gave it, and so called the nodes by the layer (`name_nodes`, rule 2), they get the path of the module around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.name_nodes import MODULE


class NormalizeLinears(ir.passes.InPlacePass):
    """Give linear layers one form; see the rules above."""

    def __init__(self, layers: Sequence[str]) -> None:
        """Set the pass up.

        Args:
            layers: module paths.
        """
        super().__init__()
        self._layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 4.

        Raises:
            AdatsqError: a layer is missing in the graph or runs more than once.
        """
        found: dict[str, list[ir.Node]] = {layer: [] for layer in self._layers}
        for node in model.graph:
            if node.op_type in ("MatMul", "Gemm") and node.metadata_props.get(MODULE) in found:
                found[node.metadata_props[MODULE]].append(node)
        for layer, nodes in found.items():
            if len(nodes) != 1:
                raise AdatsqError(
                    f"layer '{layer}' appears {len(nodes)} times in the traced graph, expected once; "
                    "leave it out of the adapter's quantizable layers"
                )
            _normalize(layer, nodes[0])
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Every layer has the one form."""
        find_linears(model, self._layers)


def find_linears(model: ir.Model, layers: Sequence[str]) -> dict[str, ir.Node]:
    """Module path → its MatMul, in the order of `layers`.

    Raises:
        AdatsqError: the graph was not normalized for a layer.
    """
    nodes = {node.metadata_props.get(MODULE): node for node in model.graph if node.op_type == "MatMul"}
    for layer in layers:
        node = nodes.get(layer)
        transpose = node.inputs[1].producer() if node is not None and node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            raise AdatsqError(f"layer '{layer}' is not in the form MatMul(x, Transpose(W)); run NormalizeLinears first")
    return {layer: nodes[layer] for layer in layers}


def weight_of(linear: ir.Node) -> ir.Value:
    """The value [N, K] that a normalized MatMul's Transpose reads."""
    transposed = linear.inputs[1]
    transpose = transposed.producer() if transposed is not None else None
    assert transpose is not None and transpose.inputs[0] is not None
    return transpose.inputs[0]


def last_node(layer: str, linear: ir.Node) -> ir.Node:
    """The layer's Add, or its MatMul where there is no bias.

    Raises:
        AdatsqError: the bias is computed.
    """
    for user, _ in linear.outputs[0].uses():
        if user.op_type == "Add" and user.metadata_props.get(MODULE) == layer:
            if any(
                value is not linear.outputs[0] and (value is None or value.const_value is None) for value in user.inputs
            ):
                raise AdatsqError(f"layer '{layer}': its bias is not a constant of the traced graph")
            return user
    return linear


def _normalize(layer: str, node: ir.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None:
        raise AdatsqError(f"layer '{layer}': the weight of its {node.op_type} is not a constant of the traced graph")
    emit = Emitter(node, f"{layer}/")
    if node.op_type == "Gemm":
        linear, output = _from_gemm(layer, node, x, weight, emit)
    else:
        linear, output = _from_matmul(layer, node, weight, emit), _after_bias(layer, node)
    linear.name = f"{layer}/MatMul"
    if not output.is_graph_output():
        output.name = f"{layer}.output"
    _leave_behind(layer, output)


def _leave_behind(layer: str, output: ir.Value) -> None:
    """Rule 4."""
    for user, _ in output.uses():
        if user.metadata_props.get(MODULE) == layer:
            user.metadata_props[MODULE] = layer.rpartition(".")[0]
            for value in user.outputs:
                _leave_behind(layer, value)


def _from_matmul(layer: str, node: ir.Node, weight: ir.Value, emit: Emitter) -> ir.Node:
    """Rule 1."""
    content = weight.const_value
    assert content is not None and node.graph is not None
    if weight.uses() and len(weight.uses()) == 1:
        del node.graph.initializers[weight.name]  # type: ignore[arg-type]
    columns, rows = (int(size) for size in content.shape.numpy())
    # Turned when it is read, so that the model's weights are not in memory twice.
    turned = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(content.numpy().T), content.dtype),
        content.dtype,
        ir.Shape([rows, columns]),
    )
    own = emit.renamed(f"{layer}.").constant("weight", turned)
    node.replace_input_with(1, _transposed(own, emit))
    return node


def _from_gemm(layer: str, node: ir.Node, x: ir.Value, weight: ir.Value, emit: Emitter) -> tuple[ir.Node, ir.Value]:
    """Rule 2."""
    given = {name: node.attributes[name].value for name in node.attributes}
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    if {**wanted, **given} != wanted or "transB" not in given:
        raise AdatsqError(f"layer '{layer}': its Gemm has the attributes {given}, expected x Wᵀ + b: {wanted}")
    assert weight.dtype is not None and node.graph is not None
    weight.name = f"{layer}.weight"
    product = emit.op("MatMul", "MatMul", [x, _transposed(weight, emit)], weight.dtype)
    linear = product.producer()
    assert linear is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    result = product if bias is None else emit.op("Add", "Add", [product, bias], weight.dtype)
    result.shape = node.outputs[0].shape
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
    if result.is_graph_output():
        result.name = node.outputs[0].name
    node.graph.remove(node, safe=True)
    return linear, result


def _transposed(weight: ir.Value, emit: Emitter) -> ir.Value:
    assert weight.dtype is not None
    return emit.op("Transpose", "Transpose", [weight], weight.dtype, perm=[1, 0])


def _after_bias(layer: str, matmul: ir.Node) -> ir.Value:
    """The output of the layer's Add, or of the MatMul when there is no bias."""
    product = matmul.outputs[0]
    for user, _ in product.uses():
        if user.op_type == "Add" and user.metadata_props.get(MODULE) == layer:
            return user.outputs[0]
    return product

"""Pass: every linear layer of a policy becomes one node of the TensorRT plugin, for all assignments at once.

Before: MatMul(x, Transpose(W)) [+ Add(bias)] in the base type (`normalize_linears`).

Rules:
    1. These nodes become one `adatsq::AdatsqLinear`; its output is "<module path>.output".
    2. Its weight inputs are "<module path>.<name>", one for each operand that some assignment reads. `inputs` lists the
       names of all inputs in their order, `profiles` the layer's format in every assignment.
    3. `plugin_namespace` and `plugin_version` let TensorRT's parser find the plugin.
    4. The graph gets the int32 input "selector", [1, assignment]: its last extent k selects the k-th assignment.
    5. A layer with an fp8 assignment has the scalar input "<module path>.activation_scale", as in other layouts; the
       node reads it as a vector of one.
    6. A layer whose input is divided for every token's scale alone has the weight input "<module path>.smoothing".
    7. The node carries the names of the layer's distinct formats as metadata FORMAT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.insert_qdq import FORMAT, SCALE_SUFFIX
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.export.normalize_linears import find_linears, last_node, weight_of
from adatsq_trt.export.plugin_function import PLUGIN_DOMAIN, PLUGIN_OP, PLUGIN_VERSION, NodeKind
from adatsq_trt.export.weight_store import StoredTensor
from adatsq_trt.formats import FORMATS
from adatsq_trt.graph_index import SELECTOR_INPUT

ASSIGNMENT_AXIS = "assignment"


class InsertPlugin(ir.passes.InPlacePass):
    """Put plugin nodes in the place of linear layers; see the rules above."""

    def __init__(
        self,
        profiles: Mapping[str, Sequence[str]],
        operands: Mapping[str, Mapping[str, StoredTensor]],
        group_sizes: Mapping[str, int],
    ) -> None:
        """Set the pass up.

        Args:
            profiles: module path → the layer's format in every assignment.
            operands: module path → name of a weight input → where its bytes are.
            group_sizes: module path → inputs that share a 4-bit scale.
        """
        super().__init__()
        self._profiles, self._operands, self._group_sizes = profiles, operands, group_sizes

    def requires(self, model: ir.Model) -> None:
        """Every layer is in the one form that the rules start from."""
        find_linears(model, list(self._profiles))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 7."""
        selector = ir.val(SELECTOR_INPUT, dtype=DataType.INT32, shape=[1, ASSIGNMENT_AXIS])
        model.graph.inputs.append(selector)
        for layer, linear in find_linears(model, list(self._profiles)).items():
            self._replace(layer, linear, selector)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every layer is one node."""
        layers = [node.metadata_props[MODULE] for node in model.graph if node.op_type == PLUGIN_OP]
        if sorted(layers) != sorted(self._profiles):
            raise ir.passes.PostconditionError(f"got plugin nodes for {len(layers)} layers of {len(self._profiles)}")

    def _replace(self, layer: str, linear: ir.Node, selector: ir.Value) -> None:
        """Rules 1 to 3."""
        x, last, old_weight = linear.inputs[0], last_node(layer, linear), weight_of(linear)
        graph = linear.graph
        assert x is not None and x.dtype is not None and isinstance(graph, ir.Graph)
        emit, named = Emitter(linear, f"{layer}/"), Emitter(linear, f"{layer}.")
        inputs = {"x": x, "selector": selector}
        if last is not linear:
            inputs["bias"] = next(
                value for value in last.inputs if value is not linear.outputs[0] and value is not None
            )
        inputs |= {name: named.constant(name, stored.tensor()) for name, stored in self._operands[layer].items()}
        if any(FORMATS[name].static_activation for name in self._profiles[layer]):
            scale = named.graph_input(SCALE_SUFFIX, DataType.FLOAT)
            inputs["x_fp8_scale"] = emit.op(
                "ScaleVector", "Unsqueeze", [scale, emit.integers("First", [0])], DataType.FLOAT
            )
        output = last.outputs[0]
        node = self._node(layer, inputs, x.dtype)
        graph.insert_before(linear, node)
        ir.convenience.replace_all_uses_with(output, node.outputs[0], replace_graph_outputs=True)
        node.outputs[0].name, node.outputs[0].shape = output.name, output.shape
        transpose = linear.inputs[1].producer()  # type: ignore[union-attr]
        graph.remove([*dict.fromkeys([last, linear]), transpose], safe=True)  # type: ignore[list-item]
        del graph.initializers[str(old_weight.name)]

    def _node(self, layer: str, inputs: Mapping[str, ir.Value], dtype: DataType) -> ir.Node:
        profiles = tuple(self._profiles[layer])
        kind = NodeKind(profiles, tuple(inputs), self._group_sizes[layer])
        attributes: dict[str, str | int] = {
            "profiles": ",".join(kind.profiles),
            "inputs": ",".join(kind.inputs),
            "group_size": kind.group_size,
            "plugin_namespace": PLUGIN_DOMAIN,
            "plugin_version": PLUGIN_VERSION,
        }
        metadata = {MODULE: layer, FORMAT: ",".join(sorted(set(profiles)))}
        return ir.node(
            PLUGIN_OP,
            list(inputs.values()),
            attributes,
            domain=PLUGIN_DOMAIN,
            overload=kind.overload,
            outputs=[ir.val(None, type=ir.TensorType(dtype))],
            name=f"{layer}/{PLUGIN_OP}",
            metadata_props=metadata,
        )

"""All assignments in one graph: a layer with several formats becomes a choice that the input `bucket` decides.

The trunk (everything outside of such layers) is there once, and a (layer, format) pair sits in the one branch that
computes it. Formats of a layer that share a weight grid read one place in the weight file.

Rules:
    1. The trunk is the first assignment's; the others differ from it in nothing but the layers' nodes.
    2. The nodes of a layer that has several formats, with their constants, move into one branch per format.
    3. Two formats: one `If`. More: one `If` for each, in a sequence; it computes its branch or passes on what came
       before, which at the beginning is nothing of use. TensorRT-RTX 1.7 compiles no `If` inside another one here.
    4. A condition is an entry of a table of assignments; layers with equal tables share it.
    5. Names in a branch end in "@<format>": TensorRT's importer has one flat namespace for the whole file.
    6. Activation scales are inputs of the whole graph, one for each layer that has one in some format.
    7. Where it is asked for, constants and what is computed from constants alone go to the trunk instead: ONNX Runtime
       computes them once there and frees what it has packed for the processor, while in a branch it keeps both.
       TensorRT wants them in the branch. A DequantizeLinear stays where its product is, to be fused with it, with its
       constants and with scalars: ONNX Runtime fuses an integer product if the zero point of its input is in the same
       graph, and if the weight is not, the product saturates on x86 without VNNI, whatever its options say.
    8. There too, formats of a layer that differ in activations only share its product, since ONNX Runtime packs the
       weight of every product: the choice is between the layer's inputs. Integer products, which are fused with what
       quantizes their inputs, stay apart. TensorRT wants that beside every product; it finds equal constants by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes import common

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.insert_qdq import FORMAT
from adatsq_trt.export.lower_quantizers import has_integer_product
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.formats import Grid, format_named
from adatsq_trt.graph_index import ASSIGNMENT_INPUT


def switch(
    models: Sequence[ir.Model], layers: Sequence[str], assignments: Sequence[Sequence[str]], constants_outside: bool
) -> ir.Model:
    """Join the graphs of all assignments; see the rules above.

    Args:
        models: one for each assignment, all of one variant; they are left as they are.
        layers: module paths.
        assignments: for each assignment the format of every layer.
        constants_outside: apply rule 7.

    Returns:
        A graph with the scalar int32 input `bucket`, an assignment's index; without that input when no layer varies.

    Raises:
        AdatsqError: a layer's nodes give more than one value to the rest of the graph.
    """
    trunk = models[0].clone()
    joined = _Joined(trunk.graph, [model.clone().graph for model in models], constants_outside)
    for layer, formats in zip(layers, zip(*assignments, strict=True), strict=True):
        if len(set(formats)) > 1:
            joined.replace(layer, formats)
    common.RemoveUnusedNodesPass()(trunk)
    return trunk


class _Joined:
    """The trunk, and the graphs that branches are taken from."""

    def __init__(self, trunk: ir.Graph, sources: Sequence[ir.Graph], constants_outside: bool) -> None:
        self._trunk, self._sources, self._constants_outside = trunk, sources, constants_outside
        self._values = ir.convenience.create_value_mapping(trunk)
        self._conditions: dict[tuple[bool, ...], ir.Value] = {}

    def replace(self, layer: str, formats: Sequence[str]) -> None:
        """Put choices in the place of a layer's nodes (rules 2 and 3).

        Args:
            layer: module path.
            formats: its format in each assignment.
        """
        nodes = _nodes_of(self._trunk, layer)
        data, old = _data(nodes), _leaving(layer, nodes)
        if self._constants_outside:
            formats = self._share_products(layer, formats, data)
        if len(set(formats)) == 1:
            return
        branches = {name: self._product(layer, name, formats) for name in dict.fromkeys(formats)}
        place, result = old.producer(), old
        for choice in self._choices(layer, formats, branches, lambda: _nothing(layer, data, old)):
            assert place is not None
            self._trunk.insert_after(place, choice)
            place, result = choice, choice.outputs[0]
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self._trunk.remove(nodes, safe=True)
        result.name, result.shape = old.name, old.shape
        self._values[str(old.name)] = result

    def _share_products(self, layer: str, formats: Sequence[str], data: ir.Value) -> list[str]:
        """Apply rule 8.

        Args:
            layer: module path.
            formats: its format in each assignment.
            data: input of the layer.

        Returns:
            The same, with one name for all formats that now share a product.
        """
        groups: dict[Grid | str, list[str]] = {}
        for name in dict.fromkeys(formats):
            fmt = format_named(name)
            groups.setdefault(name if has_integer_product(fmt) else fmt.weight, []).append(name)
        for members in groups.values():
            if len(members) > 1:
                self._choose_input(layer, members, formats, data)
        return [members[0] for name in formats for members in groups.values() if name in members]

    def _choose_input(self, layer: str, members: Sequence[str], formats: Sequence[str], data: ir.Value) -> None:
        """Choose what goes into the one product of some formats: their inputs, each rounded its own way."""
        sources = {name: self._sources[formats.index(name)] for name in members}
        title = f"{layer}/Input@{'+'.join(members)}"
        branches = {name: self._input_branch(layer, name, source) for name, source in sources.items()}
        shared, result = _linear_of(sources[members[0]], layer), data
        linear = _linear_of(self._trunk, layer)
        for choice in self._choices(title, formats, branches, lambda: _passed_on(data, title)):
            self._trunk.insert_before(linear, choice)
            result = choice.outputs[0]
        result.shape = data.shape
        self._values[_name(result)] = result
        # The first member's graph gives the product where there are others beside it, else the trunk does.
        for node, value in ((shared, ir.val(result.name, type=result.type)), (linear, result)):
            node.replace_input_with(0, value)
            node.metadata_props[FORMAT] = ",".join(members)

    def _choices(
        self,
        title: str,
        formats: Sequence[str],
        branches: Mapping[str, ir.Graph],
        nothing: Callable[[], ir.Graph],
    ) -> Iterator[ir.Node]:
        """The `If` nodes that choose between formats, in order.

        Args:
            title: beginning of the nodes' names.
            formats: the layer's format in each assignment.
            branches: format → graph that computes it.
            nothing: makes the branch of an assignment for which none of these is right, where one is needed.
        """
        (first, then), *others = branches.items()
        if len(others) == 1:
            ((_, otherwise),) = others
            yield _choose(self._condition([got == first for got in formats]), then, otherwise, title)
            return
        otherwise = nothing()
        for name, branch in branches.items():
            choice = _choose(self._condition([got == name for got in formats]), branch, otherwise, f"{title}@{name}")
            otherwise = _passed_on(choice.outputs[0], _name(choice.outputs[0]))
            yield choice

    def _condition(self, table: Sequence[bool]) -> ir.Value:
        """Whether `bucket` names one of the assignments that a table marks (rule 4)."""
        key = tuple(table)
        if key not in self._conditions:
            name = f"{ASSIGNMENT_INPUT}/{''.join('01'[marked] for marked in table)}"
            constant = _constant(f"{name}/Table", np.asarray(table))
            self._trunk.register_initializer(constant)
            output = ir.val(f"{name}/Condition", dtype=DataType.BOOL, shape=[])
            bucket = self._input(ASSIGNMENT_INPUT, DataType.INT32)
            node = ir.node("Gather", [constant, bucket], {"axis": 0}, outputs=[output], name=f"{name}/Gather")
            self._trunk.insert_before(self._trunk[0], node)
            self._conditions[key] = output
        return self._conditions[key]

    def _input(self, name: str, dtype: DataType) -> ir.Value:
        """A scalar input of the trunk, which is added when it is not there."""
        if name not in self._values:
            self._values[name] = ir.val(name, dtype=dtype, shape=[])
            self._trunk.inputs.append(self._values[name])
        return self._values[name]

    def _product(self, layer: str, name: str, formats: Sequence[str]) -> ir.Graph:
        """A layer's nodes in one format (rules 2, 5 and 6)."""
        source = self._sources[formats.index(name)]
        nodes = _nodes_of(source, layer)
        return self._branch(f"{layer}@{name}", name, source, nodes, _leaving(layer, nodes))

    def _input_branch(self, layer: str, name: str, source: ir.Graph) -> ir.Graph:
        """Make the branch that applies a format to a layer's input (rule 8)."""
        given = _linear_of(source, layer).inputs[0]
        assert given is not None
        nodes = _leading_to(given, _nodes_of(source, layer))
        if not nodes:
            return _passed_on(self._outer(given), f"{layer}/Input@{name}")
        return self._branch(f"{layer}/Input@{name}", name, source, nodes, given)

    def _branch(self, title: str, name: str, source: ir.Graph, nodes: list[ir.Node], output: ir.Value) -> ir.Graph:
        """Move nodes into a branch (rules 5 to 7).

        Args:
            title: of the branch.
            name: of the format.
            source: graph that the nodes are in.
            nodes: in order.
            output: of the branch.
        """
        made = {value for node in nodes for value in node.outputs}
        constants = sorted({v for n in nodes for v in n.inputs if v is not None and _is_own(v, nodes)}, key=_name)
        for node in nodes:
            node.name = f"{node.name}@{name}"
            for index, value in enumerate(node.inputs):
                if value is not None and value not in made and value not in constants:
                    node.replace_input_with(index, self._outer(value))
        source.remove(nodes)
        for value in constants:
            del source.initializers[_name(value)]
        for value in (*made, *constants):
            value.name = f"{value.name}@{name}"
        if self._constants_outside:
            moved = _constant_nodes(nodes, constants)
            inside = [v for v in constants if not any(user in moved for user, _ in v.uses()) and _stays(v)]
            for value in constants:
                if value not in inside:
                    self._trunk.register_initializer(value)
            for node in reversed(moved):
                self._trunk.insert_before(self._trunk[0], node)
            nodes, constants = [node for node in nodes if node not in moved], inside
        return ir.Graph([], [output], nodes=nodes, initializers=constants, name=title)

    def _outer(self, value: ir.Value) -> ir.Value:
        """The trunk's value of the same name; a scale that the trunk did not need becomes an input."""
        if value.is_graph_input():
            assert value.dtype is not None
            return self._input(_name(value), value.dtype)
        return self._values[_name(value)]


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _nodes_of(graph: ir.Graph, layer: str) -> list[ir.Node]:
    return [node for node in graph if node.metadata_props.get(MODULE) == layer]


def _linear_of(graph: ir.Graph, layer: str) -> ir.Node:
    """A layer's product."""
    (linear,) = (node for node in _nodes_of(graph, layer) if FORMAT in node.metadata_props)
    return linear


def _leading_to(value: ir.Value, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Those of the nodes that a value comes from, in order."""
    wanted, found = {value}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(v for v in node.inputs if v is not None)
            found.append(node)
    return found[::-1]


def _leaving(layer: str, nodes: Collection[ir.Node]) -> ir.Value:
    """The one value of a layer that the rest of the graph reads."""
    values = [value for node in nodes for value in node.outputs]
    leaving = [v for v in values if v.is_graph_output() or any(user not in nodes for user, _ in v.uses())]
    if len(leaving) != 1:
        raise AdatsqError(
            f"layer '{layer}' gives {len(leaving)} values to the rest of the graph, expected one, so that formats can "
            "take turns in it; leave it out of the adapter's quantizable layers"
        )
    return leaving[0]


def _data(nodes: Collection[ir.Node]) -> ir.Value:
    """The activation that a layer reads."""
    read = {v for node in nodes for v in node.inputs if v is not None and v.producer() not in nodes}
    (data,) = {v for v in read if not v.is_initializer() and (v.shape is None or v.shape.rank() > 0)}
    return data


def _is_own(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether a value is a constant that only these nodes read."""
    return value.is_initializer() and all(user in nodes for user, _ in value.uses())


def _stays(value: ir.Value) -> bool:
    """Whether a constant is a scalar, or read for a DequantizeLinear only."""
    scalar = value.const_value is not None and value.const_value.size == 1
    return scalar or all(_dequantizes(user) for user, _ in value.uses())


def _dequantizes(node: ir.Node) -> bool:
    """Whether a node is a DequantizeLinear, or computes what only one reads directly: an int8 weight is transposed."""
    users = [user.op_type for user, _ in node.outputs[0].uses()]
    return node.op_type == "DequantizeLinear" or set(users) == {"DequantizeLinear"}


def _constant_nodes(nodes: Sequence[ir.Node], constants: Collection[ir.Value]) -> list[ir.Node]:
    """Nodes that read constants and each other only, in order, but for those that dequantize."""
    known, found = set(constants), []
    for node in nodes:
        if not _dequantizes(node) and all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
            found.append(node)
    return found


def _choose(condition: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str) -> ir.Node:
    output = ir.val(f"{name}/Choice", type=then.outputs[0].type)
    branches = {"then_branch": then, "else_branch": otherwise}
    return ir.node("If", [condition], branches, outputs=[output], name=f"{name}/If")


def _passed_on(value: ir.Value, title: str) -> ir.Graph:
    """A branch that gives a value of the trunk; the title is its own in the whole file."""
    same = ir.val(f"{title}/Passed", type=value.type)
    node = ir.node("Identity", [value], outputs=[same], name=f"{title}/Pass")
    return ir.Graph([], [same], nodes=[node], name=f"{title}/otherwise")


def _nothing(layer: str, data: ir.Value, like: ir.Value) -> ir.Graph:
    """Numbers of the layer's output shape that nobody reads: one column of its input, repeated."""
    assert like.shape is not None and isinstance(like.shape[-1], int)
    numbers = {"From": 0, "To": 1, "Axis": -1, "Width": like.shape[-1]}
    constants = [_constant(f"{layer}/Nothing{name}", np.array([number])) for name, number in numbers.items()]
    column, output = (ir.val(f"{layer}/Nothing{name}", dtype=like.dtype) for name in ("Column", ""))
    nodes = [
        ir.node("Slice", [data, *constants[:3]], outputs=[column], name=f"{layer}/NothingSlice"),
        ir.node("Expand", [column, constants[3]], outputs=[output], name=f"{layer}/NothingExpand"),
    ]
    return ir.Graph([], [output], nodes=nodes, initializers=constants, name=f"{layer}@none")


def _constant(name: str, content: np.ndarray) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(content, name=name))

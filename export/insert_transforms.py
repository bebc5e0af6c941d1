"""Pass: inputs of linear layers are transformed before they are rounded, and branches of low rank stand beside them.

Before: MatMul(x, Transpose(W)) [+ Add(bias)] in the base type (`normalize_linears`); the weights become those of the
transformed layers afterwards (`insert_qdq`, `insert_plugin`). What is inserted is the same in all formats of a layer.

Rules for inputs, once for all layers that are given the same value and share a map:
    1. Divisors are powers of two, so x · inverse commutes with every rounding. Where only these layers read x, and x
       comes from products, sums and normalizations with rows of one number per channel (a norm's weight and bias, a
       modulation), these rows are multiplied instead of x.
    2. Elsewhere: one Mul.
    3. A rotation: Reshape to [..., K / block, block] → MatMul with R → Reshape back.

Rule for branches:
    4. y + (x̃ · down) · up: two MatMuls beside the layer and one Add behind it and its bias. What they give is
       "<module path>.branch", the layer's own result becomes "<module path>.product", and the sum is
       "<module path>.output".

Rule for names:
    5. Nodes are called "<module path>/…" and constants "<module path>.inverse_divisor", ".rotation", ".branch_down" and
       ".branch_up". Those of a shared input belong to its first layer by name, and by module to what holds that layer:
       where a layer switches between formats (`switch`), they stay outside of the choice. The Add carries the rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.encode_transform import EncodedBranch, EncodedMap, EncodedTransform
from adatsq_trt.export.fold_rows import rows_before
from adatsq_trt.export.normalize_linears import find_linears, last_node

RANK = "adatsq.rank"


class InsertTransforms(ir.passes.InPlacePass):
    """Put transforms in front of linear layers and branches beside them; see the rules above."""

    def __init__(self, transforms: Mapping[str, EncodedTransform]) -> None:
        """Set the pass up.

        Args:
            transforms: module path → transform, of some layers.
        """
        super().__init__()
        self._transforms = transforms

    def requires(self, model: ir.Model) -> None:
        """Every layer is in the one form that the rules start from."""
        find_linears(model, list(self._transforms))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 5."""
        linears = find_linears(model, list(self._transforms))
        order = {node: place for place, node in enumerate(model.graph)}
        groups: dict[tuple[ir.Value | None, EncodedMap], list[str]] = {}
        for layer in sorted(linears, key=lambda name: order[linears[name]]):
            key = (linears[layer].inputs[0], self._transforms[layer].input_map)
            groups.setdefault(key, []).append(layer)
        for (_, input_map), layers in groups.items():
            _map_input(layers[0], [linears[layer] for layer in layers], input_map)
        for layer, transform in self._transforms.items():
            if transform.branch is not None:
                _insert_branch(layer, linears[layer], transform.branch)
        return ir.passes.PassResult(model, modified=bool(linears))

    def ensures(self, model: ir.Model) -> None:
        """There are as many branches as layers that have one, of their ranks."""
        branches = (transform.branch for transform in self._transforms.values())
        wanted = sorted(str(branch.up.shape[0]) for branch in branches if branch is not None)
        got = sorted(node.metadata_props[RANK] for node in model.graph if RANK in node.metadata_props)
        if got != wanted:
            raise ir.passes.PostconditionError(f"got branches of the ranks {got}, expected {wanted}")


def _map_input(layer: str, linears: Collection[ir.Node], input_map: EncodedMap) -> None:
    """Rules 1 to 3.

    Args:
        layer: the first that is given the value.
        linears: all of them, in the graph's order.
        input_map: theirs.
    """
    first, *_ = linears
    x = first.inputs[0]
    assert x is not None
    holder = layer.rpartition(".")[0]
    emit, named = (Emitter(first, f"{layer}{end}", module=holder) for end in ("/", "."))
    mapped = x
    if input_map.inverse is not None:
        inverse = named.constant("inverse_divisor", input_map.inverse.tensor())
        if not _fold(layer, x, linears, inverse):
            mapped = _like(emit.op("Divide", "Mul", [x, inverse], _type(x)), x)
    if input_map.rotation is not None:
        rotation = named.constant("rotation", input_map.rotation.tensor())
        mapped = _turned(mapped, rotation, emit)
    for linear in linears:
        linear.replace_input_with(0, mapped)


def _fold(layer: str, x: ir.Value, linears: Collection[ir.Node], inverse: ir.Value) -> bool:
    """Rule 1: whether there were rows to multiply."""
    places = rows_before(x, linears)
    for node, index in places or ():
        row = node.inputs[index]
        assert row is not None
        emit = Emitter(node, f"{layer}/{node.name}/{index}/")
        factor = inverse if row.dtype is inverse.dtype else emit.cast("CastInverse", inverse, _type(row))
        node.replace_input_with(index, _like(emit.op("Divide", "Mul", [row, factor], _type(row)), row))
    return places is not None


def _turned(x: ir.Value, rotation: ir.Value, emit: Emitter) -> ir.Value:
    """Rule 3."""
    assert x.shape is not None and rotation.shape is not None
    leading, block, kind = [0] * (x.shape.rank() - 1), rotation.shape[0], _type(x)
    assert isinstance(block, int)
    blocks = emit.op("Blocks", "Reshape", [x, emit.integers("BlockShape", [*leading, -1, block])], kind)
    turned = emit.op("Rotate", "MatMul", [blocks, rotation], kind)
    return _like(emit.op("Rotated", "Reshape", [turned, emit.integers("WholeShape", [*leading, -1])], kind), x)


def _insert_branch(layer: str, linear: ir.Node, branch: EncodedBranch) -> None:
    """Rule 4."""
    x = linear.inputs[0]
    assert x is not None
    named = Emitter(linear, f"{layer}.", module=f"{layer}.branch")
    down = named.constant("branch_down", branch.down.tensor())
    up = named.constant("branch_up", branch.up.tensor())
    total = insert_beside(layer, linear, (x, down, up), "branch", "product")
    total.metadata_props[RANK] = str(branch.up.shape[0])


def insert_beside(
    layer: str, linear: ir.Node, factors: tuple[ir.Value, ir.Value, ir.Value], name: str, rest: str
) -> ir.Node:
    """Add a product of three to what a layer gives, behind its bias.

    Args:
        layer: module path.
        linear: its MatMul.
        factors: x [..., K], down [K, rank] and up [rank, N], in the type of the layer's output.
        name: "<module path>.<name>" is the product, and the module of the new nodes.
        rest: "<module path>.<rest>" is what the layer gave; its name goes to the sum.

    Returns:
        The Add.
    """
    x, down, up = factors
    last, module = last_node(layer, linear), f"{layer}.{name}"
    old = last.outputs[0]
    emit, kind, title = Emitter(linear, f"{layer}/", module=module), _type(old), name.capitalize()
    narrow = emit.op(f"{title}Down", "MatMul", [x, down], kind)
    part = _like(emit.op(f"{title}Up", "MatMul", [narrow, up], kind), old)
    users, is_output = list(old.uses()), old.is_graph_output()
    total = Emitter(last, f"{layer}/", after=True, module=module).op(f"Add{title}", "Add", [old, part], kind)
    for user, index in users:
        user.replace_input_with(index, total)
    if is_output:
        graph = last.graph
        assert isinstance(graph, ir.Graph)
        graph.outputs[list(graph.outputs).index(old)] = total
    _like(total, old)
    total.name, old.name, part.name = old.name, f"{layer}.{rest}", module
    node = total.producer()
    assert node is not None
    return node


def _like(value: ir.Value, other: ir.Value) -> ir.Value:
    value.shape = other.shape
    return value


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype

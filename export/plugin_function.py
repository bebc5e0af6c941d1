"""Meaning of a plugin node in standard operators: the model-local function of the same name.

ONNX Runtime and polygraphy run it in the place of `adatsq::AdatsqLinear`. A function's body cannot branch on a string,
so each distinct pair of a node's `profiles` and `inputs` has a function of its own, told apart by ONNX's `overload`.

The body computes in float32 and gives y the type of x:

    1. The selector's last extent k names the k-th profile; one `If` after another finds its format.
    2. Planes: a byte holds the even input in its low nibble and the odd one in its high nibble, both signed.
    3. int8 weights are w8, or 16 * w4 + lo in a nested layer, times w8_scale; int4 weights times w4_scale by group.
    4. int8 activations: x / smoothing, where there is one; step = max(amax / 127, 1e-12) of each token;
       round(x / step) * step.
    5. e4m3: clip(x / x_fp8_scale, ±448) rounded to e4m3, times x_fp8_scale.
    6. 16-bit activations stay as they are; in a float32 graph they are rounded to the format's type first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.encode import element_type
from adatsq_trt.formats import FORMATS, Element, Granularity
from adatsq_trt.quantizers import E4M3_MAX

PLUGIN_DOMAIN, PLUGIN_OP, PLUGIN_VERSION = "adatsq", "AdatsqLinear", "1"
ATTRIBUTES = ("profiles", "inputs", "group_size", "plugin_namespace", "plugin_version")
FLOAT, INT32 = DataType.FLOAT, DataType.INT32


@dataclass(frozen=True)
class NodeKind:
    """Properties of a node that decide its function.

    Attributes:
        profiles: a format for every assignment.
        inputs: names of the node's inputs, in order.
        group_size: inputs that share a 4-bit scale.
    """

    profiles: tuple[str, ...]
    inputs: tuple[str, ...]
    group_size: int

    @property
    def overload(self) -> str:
        """Names the function among those of the same operator."""
        return f"{','.join(self.profiles)};{','.join(self.inputs)};{self.group_size}"


def plugin_function(kind: NodeKind, opset: int, in_float32: bool) -> ir.Function:
    """The function of a kind of node.

    Args:
        kind: of the node.
        opset: of the body.
        in_float32: for a graph whose x is float32 (rule 6).
    """
    inputs = {name: ir.val(name) for name in kind.inputs}
    body = _Body("")
    y = _chosen(body, inputs, kind, list(dict.fromkeys(kind.profiles)), in_float32)
    if "bias" in inputs:
        y = body("Add", y, body("Cast", inputs["bias"], to=FLOAT.value))
    y = body("CastLike", y, inputs["x"])
    graph = ir.Graph(list(inputs.values()), [y], nodes=body.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in ATTRIBUTES]
    return ir.Function(PLUGIN_DOMAIN, PLUGIN_OP, kind.overload, graph=graph, attributes=attributes)


class _Body:
    """Writes nodes whose names begin with a prefix."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self.prefix = prefix

    def __call__(
        self, op_type: str, *inputs: ir.Value, **attributes: int | float | Sequence[int] | ir.Graph | ir.TensorProtocol
    ) -> ir.Value:
        output = ir.val(f"{self.prefix}{op_type}_{len(self.nodes)}")
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=f"{output.name}_node"))
        return output

    def constant(self, content: float | Sequence[int] | Sequence[bool], dtype: DataType) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(content, dtype.numpy()), dtype))

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 vector: axes and shapes."""
        return self.constant(numbers, DataType.INT64)


def _chosen(
    body: _Body, inputs: Mapping[str, ir.Value], kind: NodeKind, formats: Sequence[str], in_float32: bool
) -> ir.Value:
    """Rule 1, for the formats that are left: the product in the one that the selector selects, float32."""
    name = formats[0]
    if len(formats) == 1:
        return _product(body, inputs, kind, name, in_float32)
    table = body.constant([profile == name for profile in kind.profiles], DataType.BOOL)
    extent = body("Shape", inputs["selector"], start=-1)
    is_this = body("Gather", table, body("Sub", extent, body.integers(1)))
    branches = {}
    for branch, rest in (("then_branch", formats[:1]), ("else_branch", formats[1:])):
        inner = _Body(f"{body.prefix}{'_'.join(rest)}_")
        result = _chosen(inner, inputs, kind, rest, in_float32)
        branches[branch] = ir.Graph([], [result], nodes=inner.nodes, name="_".join(rest))
    return body("If", is_this, **branches)


def _product(body: _Body, inputs: Mapping[str, ir.Value], kind: NodeKind, name: str, in_float32: bool) -> ir.Value:
    fmt = FORMATS[name]
    if fmt.weight.is_float:
        weight = body("Cast", inputs["w16"], to=FLOAT.value)
    elif fmt.weight.element is Element.E4M3:
        codes = body("Cast", inputs["w_fp8"], to=FLOAT.value)
        weight = body("Mul", codes, body("Unsqueeze", inputs["w_fp8_scale"], body.integers(-1)))
    elif fmt.weight.granularity is Granularity.GROUP:
        weight = _in_groups(body, _plane(body, inputs["w4"]), inputs["w4_scale"], kind.group_size)
    else:
        weight = body("Mul", _eight_bits(body, inputs), body("Unsqueeze", inputs["w8_scale"], body.integers(-1)))
    x = _activation(body, inputs, name, in_float32)
    return body("MatMul", x, body("Transpose", weight, perm=[1, 0]))


def _eight_bits(body: _Body, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """Codes as float32 [N, K] (rule 3)."""
    if "lo" not in inputs:
        return body("Cast", inputs["w8"], to=FLOAT.value)
    high = body("Mul", _plane(body, inputs["w4"]), body.constant(16.0, FLOAT))
    return body("Add", high, _plane(body, inputs["lo"]))


def _plane(body: _Body, packed: ir.Value) -> ir.Value:
    """Packed int8 [N, K / 2] → float32 [N, K] (rule 2), in int32 arithmetic: Mod has its divisor's sign."""
    wide = body("Cast", packed, to=INT32.value)
    sixteen, eight = body.constant(16, INT32), body.constant(8, INT32)
    even = body("Sub", body("Mod", body("Add", wide, eight), sixteen), eight)
    odd = body("Div", body("Sub", wide, body("Mod", wide, sixteen)), sixteen)
    last = body.integers(-1)
    pairs = body("Concat", body("Unsqueeze", even, last), body("Unsqueeze", odd, last), axis=-1)
    return body("Cast", body("Reshape", pairs, body.integers(0, -1)), to=FLOAT.value)


def _in_groups(body: _Body, codes: ir.Value, scales: ir.Value, group_size: int) -> ir.Value:
    groups = body("Reshape", codes, body.integers(0, -1, group_size))
    scaled = body("Mul", groups, body("Unsqueeze", scales, body.integers(-1)))
    return body("Reshape", scaled, body.integers(0, -1))


def _activation(body: _Body, inputs: Mapping[str, ir.Value], name: str, in_float32: bool) -> ir.Value:
    """Rules 4 to 6: float32 [..., K]."""
    grid, x = FORMATS[name].activation, inputs["x"]
    if grid.is_float and in_float32:
        x = body("Cast", x, to=element_type(grid).value)
    x = body("Cast", x, to=FLOAT.value)
    if grid.granularity is Granularity.TOKEN:
        if "smoothing" in inputs:
            x = body("Div", x, inputs["smoothing"])
        largest = body("ReduceMax", body("Abs", x), body.integers(-1), keepdims=1)
        ratio = body("Div", largest, body.constant(grid.maximum, FLOAT))
        step = body("Max", ratio, body.constant(1e-12, FLOAT))
        return body("Mul", body("Round", body("Div", x, step)), step)
    if grid.granularity is Granularity.TENSOR:
        low, high = body.constant(-E4M3_MAX, FLOAT), body.constant(E4M3_MAX, FLOAT)
        kept = body("Clip", body("Div", x, inputs["x_fp8_scale"]), low, high)
        codes = body("Cast", kept, to=DataType.FLOAT8E4M3FN.value)
        return body("Mul", body("Cast", codes, to=FLOAT.value), inputs["x_fp8_scale"])
    return x

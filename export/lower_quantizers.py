"""Pass: quantizers without a CPU kernel become portable arithmetic, in a graph that is float32 already.

Rules:
    1. QuantizeLinear to e4m3: Div → Clip to ±448 → Cast to e4m3.
    2. QuantizeLinear to int8: stays, for ONNX Runtime to fuse; a Max before it keeps its codes at -127 and above, since
       the grid is symmetric.
    3. TRT_FP4DynamicQuantize: block scales = e4m3(amax / (6 · second-level scale)); elements = x / (block scale ·
       second-level scale) rounded to e2m1 by arithmetic, kept as float32.
    4. DequantizeLinear of e2m1 constants: the same bytes read as uint4 → a table of the sixteen values; then rule 5.
    5. DequantizeLinear of everything but int8 with a static input: Cast to float32 → Mul by the scale, which is
       broadcast along its axis or over its blocks. An int8 weight beside a float32 input is among these: ONNX Runtime
       makes a MatMulNBits of a DequantizeLinear there, which by default rounds the input to 8 bits without a word.
    6. DequantizeLinear → Transpose of an int8 weight whose layer has a static int8 input: Transpose →
       DequantizeLinear, the order that ONNX Runtime fuses to an integer matrix product. (On x86 without VNNI that
       product saturates unless the session option "session.x64quantprecision" is "1". It moves codes by 128, and where
       the product is not fused it would give the weight one zero point for all columns, which is refused. So the zero
       points are written down.)
    7. The MatMul of a layer whose activation format is a plain 16-bit type: its input is rounded by Cast to that type
       and Cast back.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.encode import element_type
from adatsq_trt.export.insert_qdq import FORMAT
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.export.weight_store import reinterpret
from adatsq_trt.formats import Element, Format, Granularity, format_named
from adatsq_trt.quantizers import E2M1_MAX, E4M3_MAX

FLOAT, E4M3, INT8 = DataType.FLOAT, DataType.FLOAT8E4M3FN, DataType.INT8
_E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class LowerQuantizers(ir.passes.InPlacePass):
    """Write quantizers in portable operators; see the rules above."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 7, in the graph's order, so that a rule sees lowered inputs."""
        for node in list(model.graph):
            if node.op_type == "QuantizeLinear":
                _lower_quantize(node)
            elif node.op_type == "TRT_FP4DynamicQuantize":
                _lower_fp4_quantize(node)
            elif node.op_type == "DequantizeLinear":
                _lower_dequantize(node)
            elif FORMAT in node.metadata_props:
                _round_plain_activation(node)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Only standard operators are left, and only int8 goes through Q/DQ nodes."""
        for node in model.graph:
            if node.domain not in ("", "ai.onnx"):
                raise ir.passes.PostconditionError(f"node '{node.name}' is not a standard operator")
            narrow = {"QuantizeLinear": node.outputs[0].dtype, "DequantizeLinear": _dtype(node, 0)}.get(node.op_type)
            if narrow not in (None, INT8):
                raise ir.passes.PostconditionError(f"node '{node.name}' still quantizes to {narrow}")


def _dtype(node: ir.Node, index: int) -> DataType | None:
    value = node.inputs[index] if node.inputs else None
    return value.dtype if value is not None else None


def _replace(node: ir.Node, *values: ir.Value) -> None:
    assert node.graph is not None
    for old, new in zip(node.outputs, values, strict=True):
        old.replace_all_uses_with(new)
    node.graph.remove(node, safe=True)


# --------------------------------------------------------------------------------------------------- quantize


def _lower_quantize(node: ir.Node) -> None:
    """Rules 1 and 2."""
    x, scale = node.inputs[0], node.inputs[1]
    assert x is not None and scale is not None
    emit = Emitter(node, f"{node.name}.")
    if node.outputs[0].dtype is INT8:
        lowest = emit.op("Lowest", "Mul", [scale, emit.number("LowestCode", -127.0)], FLOAT)
        node.replace_input_with(0, emit.op("Max", "Max", [x, lowest], FLOAT))
        return
    scaled = emit.op("Div", "Div", [x, scale], FLOAT)
    _replace(node, emit.cast("Cast", _clip_e4m3(scaled, emit), E4M3))


def _clip_e4m3(value: ir.Value, emit: Emitter) -> ir.Value:
    """Saturate, since a Cast would make NaN of what is too large on some backends."""
    low, high = emit.number("Lowest", -E4M3_MAX), emit.number("Highest", E4M3_MAX)
    return emit.op("Clip", "Clip", [value, low, high], FLOAT)


def _lower_fp4_quantize(node: ir.Node) -> None:
    """Rule 3."""
    x, second = node.inputs[0], node.inputs[1]
    assert x is not None and second is not None
    rank, emit = _rank(node, x), Emitter(node, f"{node.name}.")
    blocks = _to_blocks(x, rank, node.attributes["block_size"].as_int(), emit, "Blocks")
    magnitude = emit.op("Magnitude", "Abs", [blocks], FLOAT)
    largest = emit.op("Maximum", "ReduceMax", [magnitude, emit.integers("Last", [-1])], FLOAT, keepdims=0)
    unit = emit.op("Unit", "Mul", [second, emit.number("Largest", E2M1_MAX)], FLOAT)
    codes = emit.cast("Code", _clip_e4m3(emit.op("Ratio", "Div", [largest, unit], FLOAT), emit), E4M3)
    scale = emit.op("Scale", "Mul", [emit.cast("Wide", codes, FLOAT), second], FLOAT)
    zero, one = emit.number("Zero", 0.0), emit.number("One", 1.0)
    used = emit.op("IsUsed", "Greater", [scale, zero], DataType.BOOL)
    divisor = emit.op("Divisor", "Where", [used, scale, one], FLOAT)
    column = emit.op("Column", "Unsqueeze", [divisor, emit.integers("LastAxis", [-1])], FLOAT)
    points = _round_e2m1(emit.op("Scaled", "Div", [blocks, column], FLOAT), emit)
    flat = emit.op("Points", "Reshape", [points, emit.integers("Shape", [0] * (rank - 1) + [-1])], FLOAT)
    flat.shape = x.shape
    _replace(node, flat, codes)


def _round_e2m1(x: ir.Value, emit: Emitter) -> ir.Value:
    """Nearest e2m1 number: the grid's spacing is 0.5 below 2, 1 below 4, 2 above; ties to even."""
    kind = FLOAT
    bounded = emit.op(
        "Bounded", "Clip", [x, emit.number("LowestPoint", -E2M1_MAX), emit.number("HighestPoint", E2M1_MAX)], kind
    )
    size = emit.op("Size", "Abs", [bounded], kind)
    large = emit.op("IsLarge", "GreaterOrEqual", [size, emit.number("Two", 2.0)], DataType.BOOL)
    huge = emit.op("IsHuge", "GreaterOrEqual", [size, emit.number("Four", 4.0)], DataType.BOOL)
    above_two = emit.op("AboveTwo", "Where", [huge, emit.number("Coarse", 2.0), emit.number("Middle", 1.0)], kind)
    spacing = emit.op("Spacing", "Where", [large, above_two, emit.number("Fine", 0.5)], kind)
    steps = emit.op("Steps", "Round", [emit.op("InSteps", "Div", [bounded, spacing], kind)], kind)
    return emit.op("Rounded", "Mul", [steps, spacing], kind)


# ------------------------------------------------------------------------------------------------- dequantize


def _lower_dequantize(node: ir.Node) -> None:
    """Rules 4, 5 and 6."""
    codes, scale = node.inputs[0], node.inputs[1]
    assert codes is not None and scale is not None
    if codes.dtype is INT8 and codes.const_value is None:
        return
    if codes.dtype is INT8 and _feeds_integer_product(node):
        _transpose_first(node)
        return
    emit = Emitter(node, f"{node.name}.")
    if codes.dtype is DataType.FLOAT4E2M1:
        values = _look_up(codes, emit)
    else:
        values = codes if codes.dtype is FLOAT else emit.cast("Wide", codes, FLOAT)
    _replace(node, _scaled(node, values, scale, emit))


def _look_up(codes: ir.Value, emit: Emitter) -> ir.Value:
    """Rule 4."""
    assert codes.const_value is not None
    codes.const_value = reinterpret(codes.const_value, DataType.UINT4)
    codes.type = ir.TensorType(DataType.UINT4)
    indices = emit.cast("Index", codes, DataType.INT32)
    table = emit.numbers("Table", [*_E2M1_TABLE, *(-value for value in _E2M1_TABLE)])
    values = emit.op("LookUp", "Gather", [table, indices], FLOAT, axis=0)
    values.shape = codes.shape
    return values


def _scaled(node: ir.Node, values: ir.Value, scale: ir.Value, emit: Emitter) -> ir.Value:
    """Rule 5."""
    block = node.attributes.get("block_size")
    rank = 0 if scale.shape is not None and scale.shape.rank() == 0 else _rank(node, node.inputs[0])
    if rank == 0:
        return emit.op("Mul", "Mul", [values, scale], FLOAT)
    if block is None:
        column = emit.op("Column", "Unsqueeze", [scale, emit.integers("Last", [-1])], FLOAT)
        return emit.op("Mul", "Mul", [values, column], FLOAT)
    blocks = _to_blocks(values, rank, block.as_int(), emit, "Blocks")
    wide = emit.op("Column", "Unsqueeze", [scale, emit.integers("Last", [-1])], FLOAT)
    product = emit.op("Mul", "Mul", [blocks, wide], FLOAT)
    return emit.op("Flat", "Reshape", [product, emit.integers("Shape", [0] * (rank - 1) + [-1])], FLOAT)


def _to_blocks(value: ir.Value, rank: int, block: int, emit: Emitter, name: str) -> ir.Value:
    """[..., K] → [..., K / block, block]."""
    shape = emit.integers("BlockShape", [0] * (rank - 1) + [-1, block])
    return emit.op(name, "Reshape", [value, shape], FLOAT)


def _rank(node: ir.Node, value: ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise ir.passes.PassError(f"node '{node.name}': the rank of its input is not known")
    return value.shape.rank()


def has_integer_product(fmt: Format) -> bool:
    """Whether ONNX Runtime is to multiply codes of weights and of activations (rule 6)."""
    return fmt.activation.element is Element.INT and fmt.activation.granularity is Granularity.TENSOR


def _feeds_integer_product(node: ir.Node) -> bool:
    """Whether a weight's DequantizeLinear feeds a layer that rule 6 is for."""
    for transpose, _ in node.outputs[0].uses():
        for linear, _ in transpose.outputs[0].uses():
            name = linear.metadata_props.get(FORMAT)
            if name is not None:
                return has_integer_product(format_named(name))
    return False


def _transpose_first(node: ir.Node) -> None:
    """Rule 6."""
    ((transpose, _),) = node.outputs[0].uses()
    codes = node.inputs[0]
    assert codes is not None
    emit = Emitter(node, f"{node.name}.")
    assert codes.shape is not None and isinstance(codes.shape[0], int)
    # As many as the layer is wide, so they are no constant of the graph but made of two small ones.
    outputs = emit.integers("Outputs", [codes.shape[0]])
    zeros = emit.op("ZeroPoints", "Expand", [emit.number("ZeroPoint", 0, INT8), outputs], INT8)
    node.replace_input_with(0, emit.op("Transpose", "Transpose", [codes], INT8, perm=[1, 0]))
    node.resize_inputs(3)
    node.replace_input_with(2, zeros)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    _replace(transpose, node.outputs[0])


def _round_plain_activation(linear: ir.Node) -> None:
    """Rule 7."""
    grid, x = format_named(linear.metadata_props[FORMAT]).activation, linear.inputs[0]
    if x is None or not grid.is_float or grid.element is Element.FP32:
        return
    emit = Emitter(linear, f"{linear.metadata_props[MODULE]}/")
    narrow = emit.cast("RoundInput", x, element_type(grid))
    linear.replace_input_with(0, emit.cast("WidenInput", narrow, FLOAT))

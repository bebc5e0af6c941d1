"""Pass: give every linear layer of an assignment its format.

Before: MatMul(x, Transpose(W)) in the base type (`normalize_linears`). Biases are outside of it and stay as they are.

Rules for weights, which take the place of W:
    1. Plain formats: the weight itself, in the format's type.
    2. e4m3 and int8 per channel: codes [N, K] → DequantizeLinear with scales [N] on axis 0.
    3. Integers in groups: codes [N, K] → DequantizeLinear with scales [N, K / group], blocked on axis 1.
    4. e2m1: block scales (e4m3) → DequantizeLinear with the global scale; codes → DequantizeLinear with those, blocked.

Rules for activations, which take the place of x:
    5. Plain formats that are not the base type, when the weight is plain too: Cast before the MatMul and after it.
    6. Static per tensor (e4m3, int8): QuantizeLinear → DequantizeLinear; the scale is the scalar float32 graph input
       "<module path>.activation_scale", cast to the base type. ONNX's int8 reaches to -128, the grid to -127: a code
       that only inputs beyond the calibrated range meet.
    7. e2m1: x / scale → TRT_FP4DynamicQuantize with a second-level scale of one → DequantizeLinear twice. The scale is
       that same input, so that a layer can switch formats. TensorRT wants the operator's own scale to be
       constant; dividing first says the same.
    8. Integers with dynamic scales, per token or in groups of its channels: arithmetic in float32, since no backend has
       an operator for it. Below 8 bits the same graph input is the part of the largest magnitude that is kept.
    9. Every other activation stays in the base type, whatever the grid of the weight: `int4wo`, `fp8a16`, `nvfp4a16`,
       `w8a16`, and `w8a32` in a float32 graph. Where the base is float16 they compute in that, a finer grid than the
       bfloat16 that the format promises.

Rule for names:
   10. New nodes are called "<module path>/…"; the MatMul carries its format's name as metadata FORMAT.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.emitter import TRT_DOMAIN, Emitter
from adatsq_trt.export.encode import EncodedWeight, element_type
from adatsq_trt.export.normalize_linears import find_linears, weight_of
from adatsq_trt.formats import Element, Format, Granularity, Grid
from adatsq_trt.quantizers import SMALLEST_STEP, SPLITTER, group_width

FORMAT = "adatsq.format"
SCALE_SUFFIX = "activation_scale"


class InsertQdq(ir.passes.InPlacePass):
    """Quantize the layers of one assignment; see the rules above."""

    def __init__(self, formats: Mapping[str, Format], weights: Mapping[str, EncodedWeight], base: DataType) -> None:
        """Set the pass up.

        Args:
            formats: module path → format.
            weights: module path → its weight in that format.
            base: type of everything that is not quantized.
        """
        super().__init__()
        self._formats, self._weights, self._base = formats, weights, base

    def requires(self, model: ir.Model) -> None:
        """Every layer is in the one form that the rules start from."""
        find_linears(model, list(self._formats))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 10."""
        for layer, linear in find_linears(model, list(self._formats)).items():
            fmt = self._formats[layer]
            kind = element_type(fmt.weight) if fmt.weight.is_float else self._base
            _replace_weight(layer, linear, fmt.weight, self._weights[layer], kind)
            _replace_activation(layer, linear, fmt, self._weights[layer].codes.shape[1], self._base)
            if kind is not self._base:
                _compute_in(kind, layer, linear, self._base)
            linear.metadata_props[FORMAT] = fmt.name
        return ir.passes.PassResult(model, modified=bool(self._formats))

    def ensures(self, model: ir.Model) -> None:
        """Every layer carries its format, and exactly those with a number of their own have that input."""
        inputs = {value.name for value in model.graph.inputs}
        for layer, linear in find_linears(model, list(self._formats)).items():
            fmt = self._formats[layer]
            if linear.metadata_props.get(FORMAT) != fmt.name:
                raise ir.passes.PostconditionError(f"layer '{layer}' does not carry the format '{fmt.name}'")
            if (f"{layer}.{SCALE_SUFFIX}" in inputs) != fmt.scaled_activation:
                raise ir.passes.PostconditionError(f"layer '{layer}': wrong scale inputs for format '{fmt.name}'")


# ---------------------------------------------------------------------------------------------------- weights


def _replace_weight(layer: str, linear: ir.Node, grid: Grid, weight: EncodedWeight, kind: DataType) -> None:
    """Rules 1 to 4."""
    old = weight_of(linear)
    transpose = linear.inputs[1].producer()  # type: ignore[union-attr]
    assert transpose is not None and linear.graph is not None
    transpose.replace_input_with(0, None)
    del linear.graph.initializers[old.name]  # type: ignore[arg-type]
    emit = Emitter(transpose, f"{layer}/")
    codes = emit.renamed(f"{layer}.").constant("weight", weight.codes.tensor())
    transpose.replace_input_with(0, codes if grid.is_float else _dequantized(layer, codes, grid, weight, kind, emit))
    transpose.outputs[0].type = ir.TensorType(kind)


def _dequantized(
    layer: str, codes: ir.Value, grid: Grid, weight: EncodedWeight, kind: DataType, emit: Emitter
) -> ir.Value:
    """Rules 2 to 4."""
    assert weight.scales is not None
    constants = emit.renamed(f"{layer}.")
    scales = constants.constant("weight_scale", weight.scales.tensor())
    if weight.global_scale is not None:
        second = constants.number("weight_global_scale", weight.global_scale)
        wide = emit.op("DequantizeWeightScale", "DequantizeLinear", [scales, second], DataType.FLOAT)
        scales = wide if kind is DataType.FLOAT else emit.cast("CastWeightScale", wide, kind)
    grouped = grid.granularity is Granularity.GROUP
    blocked = {"axis": 1, "block_size": group_width(grid, weight.codes.shape[1])} if grouped else {"axis": 0}
    return emit.op("DequantizeWeight", "DequantizeLinear", [codes, scales], kind, **blocked)


# ------------------------------------------------------------------------------------------------ activations


def _replace_activation(layer: str, linear: ir.Node, fmt: Format, in_features: int, base: DataType) -> None:
    """Rules 6 to 9."""
    grid, x = fmt.activation, linear.inputs[0]
    assert x is not None
    emit = Emitter(linear, f"{layer}/")
    if grid.dynamic:
        inputs = emit.renamed(f"{layer}.")
        ratio = inputs.graph_input(SCALE_SUFFIX, DataType.FLOAT) if fmt.scaled_activation else None
        linear.replace_input_with(0, _dynamic(x, ratio, grid, group_width(grid, in_features), base, emit))
    elif grid.element is Element.E2M1:
        scale = emit.renamed(f"{layer}.").graph_input(SCALE_SUFFIX, DataType.FLOAT)
        linear.replace_input_with(0, _fp4(x, scale, grid, base, emit))
    elif fmt.static_activation:
        scale = emit.renamed(f"{layer}.").graph_input(SCALE_SUFFIX, DataType.FLOAT)
        linear.replace_input_with(0, _static(x, scale, element_type(grid), base, emit))


def _static(x: ir.Value, scale: ir.Value, kind: DataType, base: DataType, emit: Emitter) -> ir.Value:
    """Rule 6."""
    if base is not DataType.FLOAT:
        scale = emit.cast("CastScale", scale, base)
    zero = emit.number("ZeroPoint", 0, kind)
    codes = emit.op("QuantizeInput", "QuantizeLinear", [x, scale, zero], kind)
    return emit.op("DequantizeInput", "DequantizeLinear", [codes, scale], base)


def _fp4(x: ir.Value, scale: ir.Value, grid: Grid, base: DataType, emit: Emitter) -> ir.Value:
    """Rule 7."""
    wide = x if base is DataType.FLOAT else emit.cast("CastInput", x, DataType.FLOAT)
    scaled = emit.op("ScaleInput", "Div", [wide, scale], DataType.FLOAT)
    scaled.shape = x.shape
    codes, block_scales = emit.node(
        "QuantizeInput",
        "TRT_FP4DynamicQuantize",
        [scaled, emit.number("SecondLevelScale", 1.0)],
        [DataType.FLOAT4E2M1, DataType.FLOAT8E4M3FN],
        domain=TRT_DOMAIN,
        axis=-1,
        block_size=grid.group_size,
        scale_type=DataType.FLOAT8E4M3FN.value,
    )
    scales = emit.op("DequantizeInputScale", "DequantizeLinear", [block_scales, scale], DataType.FLOAT)
    if base is not DataType.FLOAT:
        scales = emit.cast("CastInputScale", scales, base)
    codes.shape = x.shape
    return emit.op("DequantizeInput", "DequantizeLinear", [codes, scales], base, axis=-1, block_size=grid.group_size)


def _dynamic(x: ir.Value, ratio: ir.Value | None, grid: Grid, width: int, base: DataType, emit: Emitter) -> ir.Value:
    """Rule 8: step = max(ratio * amax / qmax, 1e-12); clip(round(x / step), ±qmax) * step."""
    kind, grouped = DataType.FLOAT, grid.granularity is Granularity.GROUP
    wide = x if base is kind else emit.cast("CastInput", x, kind)
    groups = wide
    if grouped:  # [..., K / group, group]
        shape = emit.op("InputShape", "Shape", [wide], DataType.INT64, end=-1)
        split = emit.op("GroupShape", "Concat", [shape, emit.integers("Groups", [-1, width])], DataType.INT64, axis=0)
        groups = emit.op("GroupInput", "Reshape", [wide, split], kind)
    magnitude = emit.op("InputMagnitude", "Abs", [groups], kind)
    largest = emit.op("InputMaximum", "ReduceMax", [magnitude, emit.integers("LastAxis", [-1])], kind, keepdims=1)
    if ratio is not None:
        largest = emit.op("ClipMaximum", "Mul", [largest, ratio], kind)
    quotient = emit.op("InputRatio", "Div", [largest, emit.number("Qmax", grid.maximum)], kind)
    step = emit.op("InputStep", "Max", [quotient, emit.number("StepFloor", SMALLEST_STEP)], kind)
    if grouped:  # as `quantizers.eight_bits`; a Cast to bfloat16 would be dropped from graphs in float32
        wide_step = emit.op("SplitStep", "Mul", [step, emit.number("Splitter", SPLITTER)], kind)
        step = emit.op("RoundStep", "Sub", [wide_step, emit.op("StepRest", "Sub", [wide_step, step], kind)], kind)
    points = emit.op("RoundInput", "Round", [emit.op("ScaleInput", "Div", [groups, step], kind)], kind)
    low, high = emit.number("Lowest", -grid.maximum), emit.number("Highest", grid.maximum)
    kept = emit.op("ClipInput", "Clip", [points, low, high], kind)
    values = emit.op("RescaleInput", "Mul", [kept, step], kind)
    if grouped:
        values = emit.op(
            "UngroupInput", "Reshape", [values, emit.op("WholeShape", "Shape", [wide], DataType.INT64)], kind
        )
    return values if base is kind else emit.cast("CastBackInput", values, base)


def _compute_in(kind: DataType, layer: str, linear: ir.Node, base: DataType) -> None:
    """Rule 5."""
    x, result = linear.inputs[0], linear.outputs[0]
    assert x is not None and linear.graph is not None
    emit = Emitter(linear, f"{layer}/")
    linear.replace_input_with(0, emit.cast("CastInput", x, kind))
    users = list(result.uses())
    after = Emitter(linear, f"{layer}/", after=True).cast("CastOutput", result, base)
    for user, index in users:
        user.replace_input_with(index, after)
    result.type = ir.TensorType(kind)

"""Each rule against the tensor functions that calibration and search use."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir import DataType

from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.insert_qdq import _dynamic
from adatsq_trt.export.lower_quantizers import LowerQuantizers
from adatsq_trt.export.weight_store import INLINE_LIMIT_BYTES
from adatsq_trt.formats import FORMATS, format_named
from adatsq_trt.quantizers import (
    decode_e2m1,
    fake_quantize_activation,
    group_width,
    static_activation_scale,
)

RNG = np.random.default_rng(0)
HEADER = '<ir_version: 11, opset_import: ["" : 23, "trt" : 1]>\n'


def build(text: str, constants: dict[str, ir.TensorProtocol], types: dict[str, DataType]) -> ir.Model:
    """A model from ONNX text; constants and types of inner values beside it."""
    made = ir.from_onnx_text(HEADER + text)
    values = {value.name: value for node in made.graph for value in [*node.inputs, *node.outputs] if value is not None}
    for name, content in constants.items():
        values[name].const_value, values[name].shape = content, ir.Shape(content.shape.numpy())
        values[name].type = ir.TensorType(content.dtype)
        made.graph.register_initializer(values[name])
    for name, kind in types.items():
        values[name].type = ir.TensorType(kind)
    for number, node in enumerate(made.graph):
        node.name = f"n{number}"
    return made


def activations(count: int = 64) -> np.ndarray:
    """All magnitudes, some beyond the largest code, an all-zero block."""
    x = (RNG.standard_normal((4, count)) * np.exp(RNG.uniform(-6, 3, (4, count)))).astype(np.float32)
    x[0, :16] = 0
    return x


def test_rules_1_and_5_e4m3_activations(lowered):
    model = build(
        """g (float[n,64] x, float scale) => (float[n,64] y) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale)
            y = Identity(d)
        }""",
        {"zero": ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn))},
        {"q": DataType.FLOAT8E4M3FN, "d": DataType.FLOAT},
    )
    x, scale = activations(), np.float32(0.0078125)
    wanted = fake_quantize_activation(torch.tensor(x), FORMATS["fp8"].activation, torch.tensor(scale))
    np.testing.assert_array_equal(lowered(model, {"x": x, "scale": np.asarray(scale)}), wanted.numpy())


def test_rule_2_int8_codes_are_symmetric(lowered):
    model = build(
        """g (float[n,64] x, float scale) => (float[n,64] y) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale)
            y = Identity(d)
        }""",
        {"zero": ir.tensor(np.zeros((), np.int8))},
        {"q": DataType.INT8, "d": DataType.FLOAT},
    )
    x, scale = activations(), np.float32(0.046875)
    x[1, 0], x[1, 1] = -1000, 1000
    wanted = fake_quantize_activation(torch.tensor(x), FORMATS["w8a8s"].activation, torch.tensor(scale))
    got = lowered(model, {"x": x, "scale": np.asarray(scale)})
    np.testing.assert_array_equal(got, wanted.numpy())
    assert got[1, 0] == -127 * scale


def test_rule_3_fp4_activations(lowered):
    model = build(
        """g (float[n,64] x, float scale) => (float[n,64] y) {
            scaled = Div(x, scale)
            q, s = trt.TRT_FP4DynamicQuantize <axis = -1, block_size = 16, scale_type = 17> (scaled, one)
            wide = DequantizeLinear(s, scale)
            d = DequantizeLinear <axis = -1, block_size = 16> (q, wide)
            y = Identity(d)
        }""",
        {"one": ir.tensor(np.ones((), np.float32))},
        {"scaled": DataType.FLOAT, "q": DataType.FLOAT4E2M1, "s": DataType.FLOAT8E4M3FN, "wide": DataType.FLOAT},
    )
    for node in model.graph:
        if node.name == "n0":
            node.outputs[0].shape = model.graph.inputs[0].shape
    x, grid = activations(), FORMATS["nvfp4"].activation
    scale = static_activation_scale(torch.tensor(np.abs(x).max()), grid)
    wanted = fake_quantize_activation(torch.tensor(x), grid, scale).numpy()
    got = lowered(model, {"x": x, "scale": scale.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "w4a4", "w3a3", "w4a4g32", "w3a5g16"])
def test_integers_with_dynamic_scales_and_the_ratio_that_clips(lowered, name):
    """Rule 8 of `insert_qdq`; scales of groups keep their eight significant bits in float32."""
    model, fmt = build("g (float[n,64] x) => (float[n,64] y) { y = Identity(x) }", {}, {}), format_named(name)
    (node,), grid = model.graph, fmt.activation
    emit = Emitter(node, "layer/")
    ratio = emit.renamed("layer.").graph_input("activation_scale", DataType.FLOAT) if fmt.scaled_activation else None
    assert node.inputs[0] is not None
    node.replace_input_with(0, _dynamic(node.inputs[0], ratio, grid, group_width(grid, 64), DataType.FLOAT, emit))
    x, kept = activations(), torch.tensor(0.6875)
    feeds = {"x": x} if ratio is None else {"x": x, "layer.activation_scale": kept.numpy()}
    wanted = fake_quantize_activation(torch.tensor(x), grid, None if ratio is None else kept)
    np.testing.assert_array_equal(lowered(model, feeds), wanted.numpy())


def test_rule_4_fp4_constants(lowered):
    codes = RNG.integers(0, 16, (8, 32), dtype=np.uint8)
    scales = RNG.uniform(0.5, 2, (8, 2)).astype(np.float32)
    model = build(
        """g (float[8,32] x) => (float[8,32] y) {
            w = DequantizeLinear <axis = 1, block_size = 16> (codes, scales)
            y = Add(x, w)
        }""",
        {"codes": ir.tensor(codes.view(ml_dtypes.float4_e2m1fn)), "scales": ir.tensor(scales)},
        {"w": DataType.FLOAT},
    )
    wanted = decode_e2m1(torch.tensor(codes)).numpy() * scales.repeat(16, axis=1)
    np.testing.assert_array_equal(lowered(model, {"x": np.zeros((8, 32), np.float32)}), wanted)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("attributes", ["<axis = 0>", "<axis = 1, block_size = 16>"])
def test_rule_5_weights_per_channel_and_in_groups(lowered, dtype, attributes):
    codes = RNG.integers(-7, 8, (8, 32)).astype(dtype)
    scales = RNG.uniform(0.5, 2, (8,) if "block" not in attributes else (8, 2)).astype(np.float32)
    model = build(
        f"""g (float[8,32] x) => (float[8,32] y) {{
            w = DequantizeLinear {attributes} (codes, scales)
            y = Add(x, w)
        }}""",
        {"codes": ir.tensor(codes), "scales": ir.tensor(scales)},
        {"w": DataType.FLOAT},
    )
    wanted = codes.astype(np.float32) * scales.reshape(8, -1).repeat(32 // scales.reshape(8, -1).shape[1], axis=1)
    np.testing.assert_array_equal(lowered(model, {"x": np.zeros((8, 32), np.float32)}), wanted)


@pytest.mark.parametrize(
    ("name", "operators"), [("w8a8s", ["Expand", "Transpose", "DequantizeLinear"]), ("w8a8", None)]
)
def test_rule_6_int8_weights_are_transposed_before_they_are_dequantized(name, operators):
    outputs = 2 * INLINE_LIMIT_BYTES
    model = build(
        f"""g (float[n,32] x) => (float[n,{outputs}] y) {{
            w = DequantizeLinear <axis = 0> (codes, scales)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, t)
        }}""",
        {"codes": ir.tensor(np.ones((outputs, 32), np.int8)), "scales": ir.tensor(np.ones(outputs, np.float32))},
        {"w": DataType.FLOAT, "t": DataType.FLOAT},
    )
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    matmul.metadata_props.update({"adatsq.format": name, "adatsq.module": "up"})
    before = set(model.graph.initializers)
    LowerQuantizers()(model)
    added = (value for name, value in model.graph.initializers.items() if name not in before)
    assert all(value.const_value.nbytes < INLINE_LIMIT_BYTES for value in added)
    got = [node.op_type for node in model.graph if node.op_type != "MatMul"]
    assert got == (operators or ["Cast", "Unsqueeze", "Mul", "Transpose"])
    dequantize = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert all(node.attributes["axis"].as_int() == 1 for node in dequantize)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("int4wo", torch.bfloat16)]
)
def test_rule_7_plain_activations_are_rounded(lowered, name, dtype):
    model = build(
        "g (float[n,32] x) => (float[n,32] y) { y = MatMul(x, w) }",
        {"w": ir.tensor(np.eye(32, dtype=np.float32))},
        {},
    )
    next(iter(model.graph)).metadata_props.update({"adatsq.format": name, "adatsq.module": "up"})
    x = activations(32)
    np.testing.assert_array_equal(lowered(model, {"x": x}), torch.tensor(x).to(dtype).float().numpy())


def test_a_foreign_operator_that_no_rule_lowers_is_an_error():
    model = build("g (float[n] x) => (float[n] y) { y = trt.Unknown(x) }", {}, {})
    with pytest.raises(ir.passes.PostconditionError, match="not a standard operator"):
        LowerQuantizers()(model)

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from adatsq_trt.export.encode import encode_weight
from adatsq_trt.export.insert_qdq import FORMAT, InsertQdq
from adatsq_trt.export.normalize_linears import NormalizeLinears, find_linears, weight_of
from adatsq_trt.export.weight_store import ExternalData
from adatsq_trt.formats import FORMATS, format_named
from adatsq_trt.graph_index import WEIGHTS_NAME
from adatsq_trt.quantizers import quantize_nearest

LAYER = "up"


@pytest.fixture
def inserted(traced_toy, toy_layers, tmp_path):
    """The toy with one layer in a format → (model, the layer's MatMul)."""

    def insert(name: str) -> tuple[ir.Model, ir.Node]:
        model = traced_toy.clone()
        NormalizeLinears([LAYER])(model)
        weight = quantize_nearest(toy_layers[LAYER].weight.detach(), format_named(name))
        with (tmp_path / WEIGHTS_NAME).open("wb") as file:
            encoded = encode_weight(weight, format_named(name), DataType.BFLOAT16, ExternalData(file, tmp_path))
        InsertQdq({LAYER: format_named(name)}, {LAYER: encoded}, DataType.BFLOAT16)(model)
        return model, find_linears(model, [LAYER])[LAYER]

    return insert


def upstream(value: ir.Value) -> list[str]:
    """Operators that lead to a value inside the layer along first inputs, last first."""
    found = []
    while (node := value.producer()) is not None and node.name.startswith(f"{LAYER}/"):
        found.append(node.op_type)
        value = node.inputs[0]
    return found


def scale_inputs(model: ir.Model) -> dict[str, DataType]:
    return {v.name: v.dtype for v in model.graph.inputs if v.name.endswith(".activation_scale")}


def test_rule_1_a_plain_weight_in_the_base_type_stays_plain(inserted, toy_layers):
    model, linear = inserted("bf16")
    assert weight_of(linear).dtype == DataType.BFLOAT16
    assert (upstream(linear.inputs[1]), upstream(linear.inputs[0])) == (["Transpose"], [])
    assert scale_inputs(model) == {}


@pytest.mark.parametrize(("name", "kind"), [("fp8", DataType.FLOAT8E4M3FN), ("w8a8s", DataType.INT8)])
def test_rules_2_and_6_static_per_tensor(inserted, name, kind):
    model, linear = inserted(name)
    assert upstream(linear.inputs[0]) == ["DequantizeLinear", "QuantizeLinear"]
    dequantize = weight_of(linear).producer()
    codes, scales = dequantize.inputs
    assert (codes.dtype, codes.shape.numpy(), scales.shape.numpy()) == (kind, (128, 64), (128,))
    assert dequantize.attributes["axis"].as_int() == 0
    assert scale_inputs(model) == {f"{LAYER}.activation_scale": DataType.FLOAT}


@pytest.mark.parametrize(
    ("name", "kind"), [("int4wo", DataType.INT4), ("w4a4", DataType.INT4), ("w6a6", DataType.INT8)]
)
def test_rule_3_groups(inserted, name, kind):
    _, linear = inserted(name)
    dequantize = weight_of(linear).producer()
    assert {key: value.as_int() for key, value in dequantize.attributes.items()} == {"axis": 1, "block_size": 64}
    assert (dequantize.inputs[0].dtype, dequantize.inputs[1].shape.numpy()) == (kind, (128, 1))


def test_rules_4_and_7_nvfp4(inserted):
    model, linear = inserted("nvfp4")
    assert upstream(linear.inputs[0]) == ["DequantizeLinear", "TRT_FP4DynamicQuantize", "Div", "Cast"]
    scales = linear.inputs[0].producer().inputs[1]
    assert upstream(scales) == ["Cast", "DequantizeLinear", "TRT_FP4DynamicQuantize", "Div", "Cast"]
    assert upstream(linear.inputs[1]) == ["Transpose", "DequantizeLinear"]
    assert scale_inputs(model) == {f"{LAYER}.activation_scale": DataType.FLOAT}
    quantize = linear.inputs[0].producer().inputs[0].producer()
    # TensorRT's parser takes the operator's own scale as a constant only.
    assert quantize.inputs[1].const_value.numpy() == 1


def test_rule_5_another_plain_type_is_cast_to_and_back(inserted):
    _, linear = inserted("fp16")
    assert upstream(linear.inputs[0]) == ["Cast"]
    ((back, _),) = linear.outputs[0].uses()
    assert (back.op_type, back.outputs[0].dtype) == ("Cast", DataType.BFLOAT16)
    assert weight_of(linear).dtype == DataType.FLOAT16


@pytest.mark.parametrize("name", ["w4a4", "w4a8"])
def test_rule_8_integers_per_token_are_arithmetic_in_float32(inserted, name):
    model, linear = inserted(name)
    assert upstream(linear.inputs[0])[:5] == ["Cast", "Mul", "Clip", "Round", "Div"]
    assert linear.inputs[0].producer().inputs[0].dtype == DataType.FLOAT
    ratio = {f"{LAYER}.activation_scale": DataType.FLOAT}
    assert scale_inputs(model) == (ratio if name == "w4a4" else {})


def test_rule_8_groups_are_a_dimension_of_their_own(inserted):
    _, linear = inserted("w4a4g32")
    assert upstream(linear.inputs[0])[:6] == ["Cast", "Reshape", "Mul", "Clip", "Round", "Div"]
    groups = linear.inputs[0].producer().inputs[0].producer().inputs[0].producer()
    assert upstream(groups.inputs[1])[:3] == ["Sub", "Mul", "Max"]  # its scale has eight significant bits


def test_rule_9_a_weight_only_format_leaves_the_activation(inserted):
    _, linear = inserted("int4wo")
    assert upstream(linear.inputs[0]) == []


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "w3a3"])
def test_rule_10_names_formats_and_an_untouched_bias(inserted, name):
    model, linear = inserted(name)
    assert linear.metadata_props[FORMAT] == name
    assert linear.name == f"{LAYER}/MatMul"
    ((add, _),) = linear.outputs[0].uses()
    assert add.inputs[1].name == f"{LAYER}.bias"
    assert add.inputs[1].dtype == DataType.BFLOAT16
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))


def test_a_graph_that_was_not_normalized_is_refused(traced_toy):
    with pytest.raises(ir.passes.PreconditionError):
        InsertQdq({LAYER: FORMATS["bf16"]}, {}, DataType.BFLOAT16)(traced_toy.clone())


def test_fp8_scales_are_exact_in_the_base_type(inserted, toy_layers):
    _, linear = inserted("fp8")
    scales = weight_of(linear).producer().inputs[1].const_value.numpy().astype(np.float32)
    wanted = quantize_nearest(toy_layers[LAYER].weight.detach(), FORMATS["fp8"]).scales[:, 0].numpy()
    np.testing.assert_array_equal(scales, wanted)

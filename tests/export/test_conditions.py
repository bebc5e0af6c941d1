import onnx
import pytest
from onnx import TensorProto, helper

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.conditions import check_graph
from adatsq_trt.formats import FORMATS


def linear(format_name: str = "fp8", scale: bool = True, bias_type: int = TensorProto.FLOAT, width: int = 4):
    """A graph with one layer 'up'."""
    node = helper.make_node("MatMul", ["x", "w"], ["u"], name="up/MatMul")
    for key, value in (("adatsq.format", format_name), ("adatsq.module", "up")):
        node.metadata_props.add(key=key, value=value)
    wide = helper.make_node("Cast", ["up.bias"], ["b"], name="up/Cast", to=TensorProto.FLOAT)
    add = helper.make_node("Add", ["u", "b"], ["y"], name="up/Add")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])]
    if scale:
        inputs.append(helper.make_tensor_value_info("up.activation_scale", TensorProto.FLOAT, []))
    graph = helper.make_graph(
        [node, wide, add],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, [width, width], bytes(4 * width * width), raw=True),
            helper.make_tensor("up.bias", bias_type, [width], [0] * width),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def check(tmp_path):
    def run(model: onnx.ModelProto) -> None:
        onnx.save(model, tmp_path / "g.onnx")
        check_graph(tmp_path / "g.onnx", {"up": [FORMATS["fp8"]]})

    return run


def test_a_right_graph_passes(check):
    check(linear())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (linear("bf16"), "layer 'up' has format bf16, expected fp8"),
        (linear(scale=False), r"scale input 'up\.activation_scale' is missing"),
        (linear(bias_type=TensorProto.INT8), r"bias 'up\.bias' has the type INT8"),
        (linear(width=16), "tensor 'w': 1024 bytes are inside the file"),
    ],
)
def test_what_is_wrong_is_named(check, model, message):
    with pytest.raises(AdatsqError, match=message):
        check(model)


def test_a_missing_layer_is_named(check):
    model = linear()
    del model.graph.node[0].metadata_props[:]
    with pytest.raises(AdatsqError, match="layer 'up' has format none, expected fp8"):
        check(model)


def test_repeated_node_names_are_named(check):
    model = linear()
    model.graph.node[1].name = "up/Add"
    with pytest.raises(AdatsqError, match="the name 'up/Add' repeats"):
        check(model)


def test_what_onnx_checker_refuses_is_refused(check):
    model = linear()
    model.graph.node[2].op_type = "NoSuchOperator"
    with pytest.raises(AdatsqError, match=r"onnx\.checker"):
        check(model)

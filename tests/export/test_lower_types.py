import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from adatsq_trt.export.lower_types import LowerTypes
from adatsq_trt.export.weight_store import ExternalData
from adatsq_trt.graph_index import WEIGHTS_NAME

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (bfloat16[n,2] x) => (bfloat16[n,2] y) <bfloat16[2] bias> {
    [n0] wide = Cast <to = 1> (x)
    [n1] half = Mul(wide, wide)
    [n2] narrow = Cast <to = 16> (half)
    [n3] constant = Constant <value = bfloat16[1] {16256}> ()
    [n4] sum = Add(narrow, bias)
    [n5] more = Add(sum, constant)
    [n6] y = Cast <to = 16> (more)
}"""


@pytest.fixture
def model():
    made = ir.from_onnx_text(TEXT)
    bias = made.graph.initializers.get("bias") or next(
        value for node in made.graph for value in node.inputs if value is not None and value.name == "bias"
    )
    bias.const_value = ir.tensor(np.asarray([0.5, 0.25], DataType.BFLOAT16.numpy()), DataType.BFLOAT16)
    made.graph.register_initializer(bias)
    for node, kind in zip(made.graph, (1, 1, 16, 16, 16, 16, 16), strict=True):
        node.outputs[0].type = ir.TensorType(DataType(kind))
    return made


def test_rules_2_and_4_nothing_is_16_bit_and_the_numbers_are_those_of_float32(model, run_cpu):
    LowerTypes()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = np.asarray([[1.001, 2.003]], np.float32)
    np.testing.assert_array_equal(
        run_cpu(proto.SerializeToString(), {"x": x}), x * x + np.asarray([0.5, 0.25], np.float32) + 1
    )


def test_rule_3_casts_are_left_out(model):
    LowerTypes()(model)
    # The last one makes the graph's output, so it stays as a Cast to float32 that does nothing.
    assert [node.name for node in model.graph if node.op_type == "Cast"] == ["n6"]


def test_rule_1_stored_weights_are_read_through_one_cast(model, tmp_path):
    rows = np.zeros(1024, DataType.BFLOAT16.numpy())
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        stored = ExternalData(file, tmp_path).add(rows.tobytes(), DataType.BFLOAT16, (512, 2))
    model.graph.initializers["bias"].const_value = stored.tensor()
    LowerTypes()(model)
    bias = model.graph.initializers["bias"]
    assert bias.dtype == DataType.BFLOAT16
    ((cast, _),) = bias.uses()
    assert (cast.op_type, cast.outputs[0].dtype) == ("Cast", DataType.FLOAT)


def test_a_clone_keeps_its_types(model):
    """Clones share type objects; lowering one must not reach another."""
    twin = model.clone()
    LowerTypes()(model)
    assert twin.graph.inputs[0].dtype == DataType.BFLOAT16
    assert twin.graph.initializers["bias"].dtype == DataType.BFLOAT16

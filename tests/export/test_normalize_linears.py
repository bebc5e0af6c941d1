import numpy as np
import pytest

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.normalize_linears import NormalizeLinears, find_linears, weight_of


@pytest.fixture
def linears(traced_toy, toy_layers):
    model = traced_toy.clone()
    assert {node.op_type for node in model.graph} >= {"MatMul", "Gemm"}
    NormalizeLinears(list(toy_layers))(model)
    return model, find_linears(model, list(toy_layers))


def test_rules_1_and_2_weights_are_those_of_pytorch(linears, toy_layers):
    model, nodes = linears
    for layer, module in toy_layers.items():
        weight = weight_of(nodes[layer])
        assert weight.name == f"{layer}.weight"
        np.testing.assert_array_equal(weight.const_value.numpy().astype(np.float32), module.weight.detach().numpy())
        assert nodes[layer].name == f"{layer}/MatMul"
    assert not [node for node in model.graph if node.op_type == "Gemm"]


def test_rule_2_the_bias_of_a_gemm_becomes_an_add(linears):
    _, nodes = linears
    ((add, _),) = nodes["modulation"].outputs[0].uses()
    assert add.op_type == "Add"
    assert add.inputs[1].name == "modulation.bias"
    assert add.inputs[1].const_value.dtype.name == "BFLOAT16"


def test_rule_3_layer_outputs_carry_the_module_path(linears, toy_layers):
    model, _ = linears
    names = {value.name for node in model.graph for value in node.outputs}
    assert {f"{layer}.output" for layer in toy_layers} <= names


def test_a_layer_that_is_not_in_the_graph_is_an_error(traced_toy):
    with pytest.raises(AdatsqError, match=r"layer 'blocks\.9\.ff' appears 0 times"):
        NormalizeLinears(["blocks.9.ff"])(traced_toy.clone())


def test_a_graph_that_was_not_normalized_is_an_error(traced_toy):
    with pytest.raises(AdatsqError, match="run NormalizeLinears first"):
        find_linears(traced_toy, ["up"])

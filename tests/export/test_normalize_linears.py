import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export import trace
from adatsq_trt.export.name_nodes import MODULE
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


class Gated(nn.Module):
    """A value and a gate in one matrix, as GEGLU has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.up(x).chunk(2, dim=-1)
        value, gate = one.chunk(2, dim=-1)
        return value * nn.functional.gelu(gate) + other[..., :64]


def test_rule_4_what_splits_a_layers_output_is_none_of_its_nodes():
    model = trace(nn.Sequential(Gated()), {"x": torch.zeros(2, 8, 64)}, "y", torch.bfloat16)
    splits = [node for node in model.graph if node.op_type == "Split"]
    before = {node.metadata_props[MODULE] for node in splits}
    NormalizeLinears(["up"])(model)
    assert len(splits) == 2
    assert (before, {node.metadata_props[MODULE] for node in splits}) == ({"up"}, {""})
    behind = [node for node in model.graph if node.metadata_props[MODULE] == "up"]
    assert {node.op_type for node in behind} == {"Transpose", "MatMul", "Add"}

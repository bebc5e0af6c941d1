import copy

import onnx_ir as ir
import pytest
import torch
from torch import nn

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export import trace
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.export.normalize_linears import NormalizeLinears


def test_inputs_and_output_are_named_16_bit_and_have_a_dynamic_batch(traced_toy):
    assert [value.name for value in traced_toy.graph.inputs] == ["x", "condition"]
    assert [value.name for value in traced_toy.graph.outputs] == ["velocity"]
    for value in [*traced_toy.graph.inputs, *traced_toy.graph.outputs]:
        assert value.dtype == ir.DataType.BFLOAT16
        assert str(value.shape[0]) == "batch"


def test_the_module_itself_is_not_converted(toy, toy_inputs, capfd, recwarn):
    before = copy.deepcopy(toy.state_dict())
    single = {name: value[:1] for name, value in toy_inputs.items()}
    model = trace(toy, single, "velocity", torch.float16)
    after = toy.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    # A batch of one would be taken for a constant.
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    # The exporter's remarks are held back.
    assert capfd.readouterr().err == ""
    assert not [w for w in recwarn if "torch" in str(w.filename)]


def test_metadata_says_the_module_and_nothing_about_the_machine(traced_toy):
    assert {node.metadata_props[MODULE] for node in traced_toy.graph} == {"", "embed", "modulation", "up", "down"}
    assert all(set(node.metadata_props) == {MODULE} for node in traced_toy.graph)
    assert b"site-packages" not in ir.to_proto(traced_toy).SerializeToString()


def test_every_quantizable_layer_of_flux_is_found(traced_flux, small_flux):
    layers = list(small_flux.quantizable_layers())
    assert len(layers) == 12 + 5
    NormalizeLinears(layers)(traced_flux.clone())


def test_flux_keeps_its_rotary_and_timestep_arithmetic_in_float32(traced_flux):
    kinds = {node.op_type: node.outputs[0].dtype for node in traced_flux.graph if node.op_type in ("Sin", "Cos", "Pow")}
    assert kinds == dict.fromkeys(("Sin", "Cos", "Pow"), ir.DataType.FLOAT)


class Counted(nn.Module):
    """Makes a number of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(1, 2).expand(len(x), 2)


def test_a_module_that_makes_a_number_of_the_batch_is_refused():
    with pytest.raises(AdatsqError, match=r"'x' has the shape.*expected any number of rows"):
        trace(Counted(), {"x": torch.zeros(3, 2)}, "y", torch.float32)

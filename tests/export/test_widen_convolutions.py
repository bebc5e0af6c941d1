"""A patch embedding, which most image transformers begin with."""

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from adatsq_trt.export import trace
from adatsq_trt.export.widen_convolutions import WidenConvolutions


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, 8, 2, stride=2)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.embed(latent).flatten(2).mT


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_a_convolution_is_valid_in_either_type_and_computes_the_same(base, lowered) -> None:
    """Rule 1."""
    module = Patches().eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(base).float()
    latent = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    model = trace(module, {"latent": latent}, "tokens", base)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    convolution = next(node for node in model.graph if node.op_type == "Conv")
    wide = base is torch.bfloat16
    assert convolution.outputs[0].dtype is (ir.DataType.FLOAT if wide else ir.DataType.FLOAT16)
    with torch.no_grad():
        wanted = module(latent)
    torch.testing.assert_close(torch.from_numpy(lowered(model, {"latent": latent.numpy()})), wanted)


def test_other_graphs_stay_as_they_are(traced_toy) -> None:
    before = traced_toy.clone()
    assert not WidenConvolutions()(before).modified
    assert ir.to_proto(before) == ir.to_proto(traced_toy)

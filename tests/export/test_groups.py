"""Layers whose width is no multiple of 64: weights in smaller groups, compiled and computed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.formats import FORMATS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.policy import LayerShape, Policy, resident_weight_bytes
from adatsq_trt.quantizers import QuantizedWeight, dequantize_weight
from tests.export.conftest import Runner
from tests.export.test_target_graphs import build

WIDTHS = {"wide": 192, "narrow": 96, "small": 80}
GROUPS = {"wide": 64, "narrow": 32, "small": 16}


class Chain(nn.Module):
    """Three linear layers; their widths are multiples of 64, 32 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        for (name, width), out in zip(WIDTHS.items(), (96, 80, 64), strict=True):
            self.transformer.add_module(name, nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        for name in WIDTHS:
            x = self.transformer.get_submodule(name)(x)
        return x


@pytest.fixture(scope="module")
def chain() -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Chain().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return module


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 8, 192, generator=torch.Generator().manual_seed(1)).bfloat16().float()}


def layer(chain: Chain, name: str) -> nn.Linear:
    found = chain.transformer.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


@pytest.fixture(scope="module")
def weights(chain: Chain) -> dict[str, QuantizedWeight]:
    """By GPTQ, in int4."""
    with torch.no_grad():
        return {n: gptq(layer(chain, n).weight, torch.eye(w), FORMATS["int4wo"]) for n, w in WIDTHS.items()}


@pytest.fixture(scope="module")
def exported(
    chain: Chain, weights: Mapping[str, QuantizedWeight], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, GraphIndex]:
    folder = tmp_path_factory.mktemp("groups")
    policy = Policy.from_steps("chain", "0" * 64, list(WIDTHS), [("int4wo",) * 3])
    traced = trace(chain, inputs(), "y", torch.bfloat16)
    return folder, export_graphs(traced, policy, {"int4wo": weights}, folder, "bfloat16", [], ("target", "cpu"))


def test_each_layer_has_the_largest_group_that_divides_it(
    weights: Mapping[str, QuantizedWeight], exported: tuple[Path, GraphIndex]
) -> None:
    counted = {
        name: WIDTHS[name] // found.scales.shape[1] for name, found in weights.items() if found.scales is not None
    }
    assert counted == GROUPS
    folder, index = exported
    nodes = onnx.load(folder / index.find("target", 0).path, load_external_data=False).graph.node
    blocks = {
        node.name.split("/")[0]: next(a.i for a in node.attribute if a.name == "block_size")
        for node in nodes
        if node.op_type == "DequantizeLinear"
    }
    assert blocks == GROUPS


def test_stored_bits_count_the_scales_of_smaller_groups(weights: Mapping[str, QuantizedWeight]) -> None:
    shapes = {name: LayerShape(name, width, len(weights[name].codes), 1) for name, width in WIDTHS.items()}
    policy = Policy.from_steps("chain", "0" * 64, list(WIDTHS), [("int4wo",) * 3])
    stored = sum(w.codes.numel() / 2 + 2 * w.scales.numel() for w in weights.values() if w.scales is not None)
    assert resident_weight_bytes(policy, shapes) == stored


def test_tensorrt_rtx_compiles_smaller_groups(exported: tuple[Path, GraphIndex]) -> None:
    folder, index = exported
    sizes = {target: build(str(folder / index.find("target", 0).path), target) for target in ("SM80", "SM89", "SM120")}
    assert all(size > 0 for size in sizes.values())


def test_the_cpu_graph_computes_what_pytorch_does(
    chain: Chain, weights: Mapping[str, QuantizedWeight], exported: tuple[Path, GraphIndex], run_cpu: Runner
) -> None:
    folder, index = exported
    wanted = inputs()["x"]
    with torch.no_grad():
        for name, weight in weights.items():
            wanted = nn.functional.linear(wanted, dequantize_weight(weight, FORMATS["int4wo"]), layer(chain, name).bias)
    got = run_cpu(str(folder / index.find("cpu", 0).path), {k: v.numpy() for k, v in inputs().items()})
    exact = chain(inputs()["x"]).detach().numpy()
    error = np.square(got - wanted.numpy()).mean()
    assert error < 1e-2 * np.square(exact - wanted.numpy()).mean()

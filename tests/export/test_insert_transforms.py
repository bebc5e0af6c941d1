"""The rules of transforms in graphs, each on a toy whose input comes from a modulated norm."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.make import TRANSFORMS, make_transforms
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.errors import MismatchError
from adatsq_trt.export import trace
from adatsq_trt.export.emitter import BASE_TYPES
from adatsq_trt.export.encode_transform import encode_transform
from adatsq_trt.export.fold_rows import rows_before
from adatsq_trt.export.insert_transforms import RANK, InsertTransforms
from adatsq_trt.export.normalize_linears import NormalizeLinears, find_linears
from adatsq_trt.export.weight_store import ExternalData
from adatsq_trt.graph_index import WEIGHTS_NAME
from adatsq_trt.transforms import InputMap, LayerTransform

WIDTH = 64
GROUPS = (("q", "k"), ("out",))


class Modulated(nn.Module):
    """A norm without weights, scaled and shifted by each sample; two layers read it and one reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.q, self.k = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96, bias=False)
        self.out = nn.Linear(96, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        hidden = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return x + self.out(functional.gelu(self.q(hidden), approximate="tanh") + self.k(hidden))


class Wrapper(nn.Module):
    """The wrapper that an adapter's trace module is."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.block = Modulated()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.transformer.block(x, condition)


@pytest.fixture(scope="module")
def module() -> Modulated:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapper = Wrapper().eval()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.copy_(parameter.bfloat16())
    return wrapper


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(3, 5, WIDTH, generator=generator),
        "condition": torch.randn(3, WIDTH, generator=generator),
    }


@pytest.fixture(scope="module")
def traced(module: Modulated, inputs: dict[str, Tensor]) -> ir.Model:
    model = trace(module, inputs, "velocity", torch.bfloat16)
    NormalizeLinears([f"block.{name}" for group in GROUPS for name in group])(model)
    return model


def made(module: Modulated, name: str, blocks: tuple[int, ...] = (16,)) -> dict[str, LayerTransform]:
    """Transforms of inputs whose channels differ a thousandfold."""
    groups = []
    for names in GROUPS:
        weights = {f"block.{n}": getattr(module.transformer.block, n).weight.detach() for n in names}
        width = next(iter(weights.values())).shape[1]
        groups.append(LayerGroup(weights, 10 ** torch.linspace(-1, 2, width)[None]))
    return make_transforms(name, groups, GraphForm(torch.bfloat16, blocks))


@pytest.fixture
def inserted(traced: ir.Model, module: Modulated, tmp_path: Path) -> Callable[[Mapping[str, LayerTransform]], ir.Model]:
    """The toy with transforms in front of its layers and the weights that belong to them, unrounded in float32."""

    def insert(transforms: Mapping[str, LayerTransform]) -> ir.Model:
        model = traced.clone()
        with (tmp_path / WEIGHTS_NAME).open("wb") as file:
            store = ExternalData(file, tmp_path)
            own = {layer: encode_transform(layer, t, BASE_TYPES["bfloat16"], store) for layer, t in transforms.items()}
        InsertTransforms(own)(model)
        for value in model.graph.initializers.values():  # for models in memory
            value.const_value = ir.tensor(value.const_value.numpy(), value.const_value.dtype)
        for layer in transforms:
            linear = module.transformer.get_submodule(layer)
            weight = model.graph.initializers[f"{layer}.weight"]
            rounded = transforms[layer].rounded_weight(linear.weight.detach())
            weight.const_value = ir.tensor(rounded.numpy())
            weight.type = ir.TensorType(ir.DataType.FLOAT)
        return model

    return insert


def nodes(model: ir.Model, end: str) -> list[str]:
    return [node.name for node in model.graph if node.name.endswith(end)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_graph_computes_what_it_did(name: str, module, inputs, inserted, lowered) -> None:
    got = lowered(inserted(made(module, name)), {n: v.numpy() for n, v in inputs.items()})
    with torch.no_grad():
        wanted = module(**inputs).numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("blocks", [(64, 16), (32, 16)])
def test_rule_3_blocks_of_any_width(blocks, module, inputs, inserted, lowered) -> None:
    """32 has no whole root, as 128: its entries are powers of two all the same."""
    transforms = made(module, "balance", blocks)
    rotation = transforms["block.q"].input_map.rotation
    assert rotation is not None
    assert rotation.shape == (blocks[0],) * 2
    assert torch.equal(rotation.abs().log2(), rotation.abs().log2().round())
    got = lowered(inserted(transforms), {n: v.numpy() for n, v in inputs.items()})
    with torch.no_grad():
        wanted = module(**inputs).numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_rules_1_and_2_a_norm_takes_the_divisor_and_an_activation_does_not(module, inserted) -> None:
    model = inserted(made(module, "smooth"))
    linears = find_linears(model, ["block.q", "block.k", "block.out"])
    assert linears["block.q"].inputs[0] is linears["block.k"].inputs[0]
    assert linears["block.q"].inputs[0].producer().op_type == "Add", "nothing stands before the layers themselves"
    assert "block.out/Divide" in nodes(model, "/Divide")
    folded = [name for name in nodes(model, "/Divide") if name != "block.out/Divide"]
    assert len(folded) == 2, "what scales and what shifts"
    assert all(name.startswith("block.q/") for name in folded)


def test_rule_1_a_folded_divisor_gives_every_bit_of_one_that_is_not(
    module, inputs, inserted, lowered, monkeypatch
) -> None:
    transforms, feed = made(module, "smooth"), {n: v.numpy() for n, v in inputs.items()}
    folded = inserted(transforms)
    monkeypatch.setattr("adatsq_trt.export.insert_transforms.rows_before", lambda *_: None)
    apart = inserted(transforms)
    assert len(nodes(apart, "/Divide")) == 2 < len(nodes(folded, "/Divide"))
    np.testing.assert_array_equal(lowered(folded, feed), lowered(apart, feed))


def test_rule_1_what_something_else_reads_stays(traced: ir.Model) -> None:
    linears = find_linears(traced, ["block.q", "block.k"])
    hidden = linears["block.q"].inputs[0]
    assert rows_before(hidden, list(linears.values())) is not None
    assert rows_before(hidden, [linears["block.q"]]) is None
    assert rows_before(find_linears(traced, ["block.out"])["block.out"].inputs[0], list(linears.values())) is None


def test_rule_3_layers_of_one_input_share_its_rotation(module, inserted) -> None:
    model = inserted(made(module, "hadamard"))
    assert nodes(model, "/Rotate") == ["block.q/Rotate", "block.out/Rotate"]
    linears = find_linears(model, ["block.q", "block.k"])
    assert linears["block.q"].inputs[0] is linears["block.k"].inputs[0]


def test_rules_4_and_5_a_branch_stands_beside_its_layer(module, inserted) -> None:
    model = inserted(made(module, "low-rank"))
    added = {node.outputs[0].name: node for node in model.graph if RANK in node.metadata_props}
    assert sorted(added) == ["block.k.output", "block.out.output", "block.q.output"]
    shapes = {name: value.shape.numpy() for name, value in model.graph.initializers.items() if ".branch_" in name}
    assert shapes["block.q.branch_down"] == (WIDTH, 1)
    assert shapes["block.q.branch_up"] == (1, 96)
    assert {node.metadata_props[RANK] for node in added.values()} == {"1"}
    assert added["block.q.output"].inputs[0].name == "block.q.product"


def test_a_transform_that_was_not_made_for_graphs_is_refused(tmp_path: Path) -> None:
    transform = LayerTransform(InputMap(torch.tensor([3.0, 1.0])))
    with (tmp_path / "weights").open("wb") as file, pytest.raises(MismatchError, match=r"layer 'up'.*bfloat16"):
        encode_transform("up", transform, BASE_TYPES["bfloat16"], ExternalData(file, tmp_path))

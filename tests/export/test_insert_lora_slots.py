"""Branches for LoRAs beside quantized layers: what they add, and that without one nothing is added."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.calibration.transforms.graph_form import GraphForm, rotated_blocks
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.engines.build import build_plans
from adatsq_trt.export import export_graphs
from adatsq_trt.export.insert_lora_slots import InsertLoraSlots
from adatsq_trt.export.normalize_linears import NormalizeLinears
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import GraphFile, GraphIndex, lora_inputs
from adatsq_trt.models.rounding import stored_weight
from adatsq_trt.models.simulated import SharedRounding, SimulatedLinear
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest
from adatsq_trt.transforms import InputMap, LayerTransform

RANK, SCALE = 3, 0.02
FORMATS_OF = {"sm120": ("nvfp4", "fp8"), "cpu": ("w8a8s", "fp8")}
Matrices = Mapping[str, tuple[Tensor, Tensor]]


def make_transforms_of(name: str | None, layers: Mapping[str, nn.Linear], names) -> dict[str, LayerTransform]:
    """Of inputs whose channels differ a hundredfold."""
    if name is None:
        return {}
    form = GraphForm(torch.bfloat16, rotated_blocks(FORMATS[n] for n in names))
    groups = [
        LayerGroup({layer: m.weight.detach()}, 10 ** torch.linspace(-1, 1, m.in_features)[None])
        for layer, m in layers.items()
    ]
    return make_transforms(name, groups, form)


def make_weights(layers, names, transforms) -> dict[str, dict[str, QuantizedWeight]]:
    weights = dict[str, dict[str, QuantizedWeight]]()
    for name in names:
        for layer, module in layers.items():
            weight = module.weight.detach()
            rounded = transforms[layer].rounded_weight(weight) if layer in transforms else weight
            weights.setdefault(name, {})[layer] = quantize_nearest(rounded, FORMATS[name])
    return weights


def export(folder: Path, traced, layers, target: str = "cpu", transform=None, slots: int | None = RANK) -> GraphIndex:
    """Two assignments, in which layers change their formats."""
    names = FORMATS_OF[target]
    rows = [[names[(i + j) % 2] for j in range(len(layers))] for i in range(2)]
    policy = Policy.from_steps("toy", "0" * 64, list(layers), rows)
    transforms = make_transforms_of(transform, layers, names)
    weights, variants = make_weights(layers, names, transforms), ("cpu",) if target == "cpu" else ("target",)
    own = (policy, weights, folder / "onnx", "bfloat16", [], variants, None, transforms)
    return export_graphs(traced.clone(), *own, lora_slots=slots)


def make_matrices(layers: Mapping[str, nn.Linear], rank: int = RANK) -> Matrices:
    """Of every layer: down [K, rank] and up [rank, N], about as large as the layer's own change would be."""
    generator = torch.Generator().manual_seed(5)
    shapes = {layer: (m.in_features, m.out_features) for layer, m in layers.items()}
    return {
        layer: (torch.randn(k, rank, generator=generator) / k**0.5, torch.randn(rank, n, generator=generator))
        for layer, (k, n) in shapes.items()
    }


def feed(graph: GraphFile, inputs: Mapping[str, Tensor], matrices: Matrices) -> dict[str, np.ndarray]:
    given = {name: value.numpy() for name, value in inputs.items()}
    given |= {s.name: np.asarray(SCALE, np.float32) for s in graph.scale_inputs.values()}
    for layer, pair in matrices.items():
        given |= {name: matrix.numpy() for name, matrix in zip(lora_inputs(layer), pair, strict=True)}
    return given


def nothing(layers: Mapping[str, nn.Linear]) -> Matrices:
    return {layer: tuple(torch.zeros_like(m) for m in pair) for layer, pair in make_matrices(layers).items()}


class Beside(nn.Module):
    """A layer with its LoRA, which reads what the layer is given."""

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down @ self.up


def test_rules_1_to_3_inputs_products_and_a_sum(traced_toy, toy_layers) -> None:
    model = traced_toy.clone()
    NormalizeLinears(list(toy_layers))(model)
    InsertLoraSlots(list(toy_layers), RANK)(model)
    shapes = {v.name: tuple(v.shape.numpy()) for v in model.graph.inputs if v.name.startswith("lora.")}
    assert shapes == {
        "lora.modulation.down": (64, RANK),
        "lora.modulation.up": (RANK, 64),
        "lora.up.down": (64, RANK),
        "lora.up.up": (RANK, 128),
        "lora.down.down": (128, RANK),
        "lora.down.up": (RANK, 64),
    }
    assert {v.dtype for v in model.graph.inputs if v.name.startswith("lora.")} == {ir.DataType.BFLOAT16}
    added = {n.outputs[0].name: [v.name for v in n.inputs] for n in model.graph if n.name.endswith("/AddLora")}
    assert added == {f"{layer}.output": [f"{layer}.without_lora", f"{layer}.lora"] for layer in toy_layers}


def test_without_a_lora_every_bit_is_as_without_slots(traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path) -> None:
    plain = export(tmp_path / "plain", traced_toy, toy_layers, slots=None)
    slots = export(tmp_path / "slots", traced_toy, toy_layers)
    assert not any(graph.lora_inputs for graph in plain.graphs)
    for own, other in zip(plain.graphs, slots.graphs, strict=True):
        assert (own.path, own.inputs, own.position_inputs) == (other.path, other.inputs, other.position_inputs)
        assert len(other.lora_inputs) == 2 * len(toy_layers)
        turn = {} if own.assignment_input is None else {"assignment": np.asarray(1, np.int32)}
        wanted = run_cpu(str(tmp_path / "plain/onnx" / own.path), {**feed(own, toy_inputs, {}), **turn})
        given = {**feed(other, toy_inputs, nothing(toy_layers)), **turn}
        np.testing.assert_array_equal(run_cpu(str(tmp_path / "slots/onnx" / own.path), given), wanted)


def test_in_full_precision_it_is_the_fused_layer(toy, traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path) -> None:
    matrices, fused = make_matrices(toy_layers), copy.deepcopy(toy)
    graph = export(tmp_path, traced_toy, toy_layers).find("reference", None)
    with torch.no_grad():
        for layer, (down, up) in matrices.items():
            fused.transformer.get_submodule(layer).weight += (down @ up).T
        wanted, before = fused(**toy_inputs).numpy(), toy(**toy_inputs).numpy()
    got = run_cpu(str(tmp_path / "onnx" / graph.path), feed(graph, toy_inputs, matrices))
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(wanted - before).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("transform", [None, "balance-low-rank"])
def test_it_reads_the_layers_own_input_beside_any_transform(
    toy, traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path, transform
) -> None:
    """Neither rounded nor divided nor turned; alone and where assignments take turns."""
    index, matrices = export(tmp_path, traced_toy, toy_layers, transform=transform), make_matrices(toy_layers)
    names, transforms = FORMATS_OF["cpu"], make_transforms_of(transform, toy_layers, FORMATS_OF["cpu"])
    weights, scale = make_weights(toy_layers, names, transforms), torch.tensor(SCALE)
    for assignment in range(2):
        twin = copy.deepcopy(toy)
        for place, (layer, original) in enumerate(toy_layers.items()):
            fmt = FORMATS[names[(assignment + place) % 2]]
            stored = {fmt.name: stored_weight(weights[fmt.name][layer], fmt)}
            linear = SimulatedLinear(
                original, stored, SharedRounding(), transforms.get(layer, LayerTransform(InputMap()))
            )
            linear.active, linear.scale = fmt, scale
            setattr(twin.transformer, layer, Beside(linear, *matrices[layer]))
        with torch.no_grad():
            wanted = twin(**toy_inputs).numpy()
        for graph in (index.find("cpu", assignment), index.find("cpu", None)):
            given = feed(graph, toy_inputs, matrices)
            if graph.assignment is None:
                given["assignment"] = np.asarray(assignment, np.int32)
            got = run_cpu(str(tmp_path / "onnx" / graph.path), given)
            assert np.median(np.abs(got - wanted)) < 2e-5 * wanted.std()


@pytest.mark.parametrize(
    ("layout", "transform"), [("embedded", None), ("shared", "balance-low-rank"), ("switch", "smooth")]
)
def test_every_layout_compiles(traced_toy, toy_layers, tmp_path, layout, transform) -> None:
    """With the real compiler; matrices of LoRAs are inputs of the plan in all of them."""
    index = export(tmp_path, traced_toy, toy_layers, "sm120", transform)
    plans = build_plans(tmp_path, index, [TARGETS["sm120"]], 8, layout=layout)
    assert len(plans) == (1 if layout == "switch" else 2)
    graph = onnx.load(tmp_path / "onnx" / index.find("target", None).path, load_external_data=False).graph
    names = {name for layer in toy_layers for name in lora_inputs(layer)}
    assert {value.name for value in graph.input} >= names
    assert {v.type.tensor_type.elem_type for v in graph.input if v.name in names} == {onnx.TensorProto.BFLOAT16}

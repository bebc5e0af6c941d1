"""Every transform with every target and every layout, as a Latin square; the real compilers."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_ir import DataType

from adatsq_trt.calibration.transforms.graph_form import GraphForm, rotated_blocks
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.plan_weights import STORE_NAME, initializers
from adatsq_trt.export import export_graphs, export_plugin_graphs, trace
from adatsq_trt.files import MappedTensors, read_json_model
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from adatsq_trt.models.rounding import stored_weight
from adatsq_trt.models.simulated import SharedRounding, SimulatedLinear
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.transforms import LayerTransform

FORMATS_OF = {"sm120": ("nvfp4", "fp8"), "sm89": ("fp8", "int4wo"), "cpu": ("w8a8s", "w8a32")}
SQUARE = [
    ("smooth", "sm89", "embedded"),
    ("hadamard", "sm120", "shared"),
    ("balance", "sm89", "switch"),
    ("low-rank", "sm120", "switch"),
    ("hadamard-low-rank", "sm89", "shared"),
    ("balance-low-rank", "sm120", "embedded"),
]


def transforms_of(name: str, layers, formats) -> dict[str, LayerTransform]:
    """Of inputs whose channels differ a hundredfold."""
    form = GraphForm(torch.bfloat16, rotated_blocks(FORMATS[n] for n in formats))
    groups = [
        LayerGroup({layer: m.weight.detach()}, 10 ** torch.linspace(-1, 1, m.in_features)[None])
        for layer, m in layers.items()
    ]
    return make_transforms(name, groups, form)


def export(folder: Path, traced, layers, transform: str, target: str) -> GraphIndex:
    """Two assignments, in which layers change their formats."""
    names = FORMATS_OF[target]
    rows = [[names[(i + j) % 2] for j in range(len(layers))] for i in range(2)]
    policy = Policy.from_steps("toy", "0" * 64, list(layers), rows)
    transforms = transforms_of(transform, layers, names)
    weights = {
        name: {
            layer: quantize_nearest(transforms[layer].rounded_weight(m.weight.detach()), FORMATS[name])
            for layer, m in layers.items()
        }
        for name in names
    }
    variants = ("cpu",) if target == "cpu" else ("target",)
    return export_graphs(traced.clone(), policy, weights, folder / "onnx", "bfloat16", [], variants, None, transforms)


@pytest.mark.parametrize(("transform", "target", "layout"), SQUARE)
def test_every_transform_compiles(traced_toy, toy_layers, tmp_path, transform: str, target: str, layout) -> None:
    index = export(tmp_path, traced_toy, toy_layers, transform, target)
    plans = build_plans(tmp_path, index, [TARGETS[target]], 8, layout=layout)
    assert len(plans) == (1 if layout == "switch" else 2)
    ranks = dict.fromkeys(toy_layers, 1) if "low-rank" in transform else {}
    assert read_json_model(tmp_path / "onnx" / INDEX_NAME, GraphIndex).branches == ranks


@pytest.mark.parametrize("transform", [row[0] for row in SQUARE])
def test_formats_take_turns_behind_a_transform(
    traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path, transform
) -> None:
    """The graph of all assignments gives what the graph of each gives."""
    index = export(tmp_path, traced_toy, toy_layers, transform, "cpu")
    feed, together = {n: v.numpy() for n, v in toy_inputs.items()}, index.find("cpu", None)
    outputs = []
    for assignment in range(2):
        own = index.find("cpu", assignment)
        scales = {s.name: np.asarray(0.02, np.float32) for s in together.scale_inputs.values()}
        given = {name: scales[name] for name in (s.name for s in own.scale_inputs.values())}
        outputs.append(run_cpu(str(tmp_path / "onnx" / own.path), {**feed, **given}))
        both = {**feed, **scales, "assignment": np.asarray(assignment, np.int32)}
        got = run_cpu(str(tmp_path / "onnx" / together.path), both)
        # Whether ONNX Runtime adds the bias inside an integer product depends on what is around it.
        assert np.median(np.abs(got - outputs[-1])) < 1e-6 * got.std()
    assert not np.array_equal(*outputs)


def test_matrices_that_weigh_anything_are_inputs_of_shared_plans(tmp_path) -> None:
    """So a branch can be exchanged beside the quantized weight, as a LoRA is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {"up": torch.nn.Linear(512, 256)}

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = torch.nn.Module()
            self.transformer.up = layers["up"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(self.transformer.up(x), approximate="tanh")

    traced = trace(Wide().eval(), {"x": torch.randn(4, 512)}, "velocity", torch.bfloat16)
    index = export(tmp_path, traced, layers, "low-rank", "sm89")
    assert index.branches == {"up": 3}
    build_plans(tmp_path, index, [TARGETS["sm89"]], 8, layout="shared")
    store = MappedTensors([tmp_path / "plans" / STORE_NAME])
    assert tuple(store["up.branch_down"].shape) == (512, 3)
    assert tuple(store["up.branch_up"].shape) == (3, 256)


def test_a_layer_whose_formats_take_turns_has_one_branch(traced_toy, toy_layers, tmp_path) -> None:
    """Its matrices are outside of the `If`, once."""
    index = export(tmp_path, traced_toy, toy_layers, "low-rank", "sm120")
    graph = onnx.load(tmp_path / "onnx" / index.find("target", None).path, load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if ".branch_" in tensor.name]
    assert sorted(names) == sorted(f"{layer}.branch_{part}" for layer in toy_layers for part in ("down", "up"))
    everywhere = [tensor.name for tensor in initializers(graph) if ".branch_" in tensor.name]
    assert everywhere == names
    assert {tensor.data_type for tensor in graph.initializer if ".branch_" in tensor.name} == {DataType.BFLOAT16}


def test_plugin_nodes_divide_where_all_their_formats_quantize_tokens(
    toy, traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path
) -> None:
    """Elsewhere a Mul stands in front of them; either way they give what PyTorch gives."""
    formats = {"modulation": ("w8a8", "bf16"), "up": ("w8a8", "w4a8"), "down": ("w4a8", "fp8")}
    names = ("w8a8", "w4a8", "fp8", "bf16")
    policy = Policy.from_steps("toy", "0" * 64, list(formats), list(zip(*formats.values(), strict=True)))
    transforms = transforms_of("smooth", toy_layers, names)
    weights = {
        name: {
            layer: quantize_nearest(transforms[layer].rounded_weight(m.weight.detach()), FORMATS[name])
            for layer, m in toy_layers.items()
        }
        for name in names
    }
    index = export_plugin_graphs(traced_toy.clone(), policy, weights, tmp_path, "bfloat16", [], transforms=transforms)
    graph = index.find("cpu", None)
    nodes = {node.name: node for node in onnx.load(tmp_path / graph.path, load_external_data=False).graph.node}
    inputs = {
        layer: next(a.s.decode() for a in nodes[f"{layer}/AdatsqLinear"].attribute if a.name == "inputs").split(",")
        for layer in formats
    }
    assert {layer for layer, own in inputs.items() if "smoothing" in own} == {"up"}
    assert {name for name in nodes if name.endswith("/Divide")} == {"modulation/Divide", "down/Divide"}
    scale = torch.tensor(0.02)
    for assignment, row in enumerate(policy.assignments):
        feed = {name: value.numpy() for name, value in toy_inputs.items()}
        feed |= {s.name: scale.numpy() for s in graph.scale_inputs.values()}
        got = run_cpu(str(tmp_path / graph.path), {**feed, "selector": np.zeros((1, assignment + 1), np.int32)})
        twin = copy.deepcopy(toy)
        for layer, name in zip(formats, row, strict=True):
            fmt, original = FORMATS[name], getattr(twin.transformer, layer)
            stored = {name: stored_weight(weights[name][layer], fmt)}
            linear = SimulatedLinear(original, stored, SharedRounding(), transforms[layer])
            linear.active, linear.scale = fmt, scale if fmt.static_activation else None
            setattr(twin.transformer, layer, linear)
        with torch.no_grad():
            wanted = twin(**toy_inputs).numpy()
        assert np.median(np.abs(got - wanted)) < 2e-5 * wanted.std()

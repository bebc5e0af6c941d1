"""Formats that share a weight grid share the layer's bytes: in the weight file, in graphs, in plans, in sessions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.plan_weights import STORE_NAME, initializers, weight_of
from adatsq_trt.engines.sizes import constant_bytes
from adatsq_trt.errors import MismatchError
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight, fake_quantize_activation, quantize_nearest

# "modulation" keeps its weight and its activations, "up" two kinds of activations over one weight, "down" has three
# formats over two weights.
ROWS = [("fp8", "fp8", "nvfp4"), ("fp8", "fp8a16", "nvfp4a16"), ("fp8", "fp8", "fp8"), ("fp8", "fp8a16", "nvfp4")]
THREE = [("fp8", name, name) for name in ("w4a8", "int4wo", "w4a4")]
INT8 = [("w8a8s", "w8a8s", "w8a8s"), ("w8a8s", "w8a32", "w8a32"), ("w8a8s", "w8a8s", "w8a32")]


def quantize(layers: dict[str, nn.Linear], rows: Sequence[Sequence[str]]) -> dict[str, dict[str, QuantizedWeight]]:
    names = {name for row in rows for name in row}
    return {n: {layer: quantize_nearest(m.weight.detach(), FORMATS[n]) for layer, m in layers.items()} for n in names}


def export(
    folder: Path, traced, layers, rows: Sequence[Sequence[str]], variants: Sequence[str] = ("target", "cpu")
) -> GraphIndex:
    policy = Policy.from_steps("toy", "0" * 64, list(layers), rows)
    return export_graphs(traced.clone(), policy, quantize(layers, rows), folder, "bfloat16", [], variants)


@pytest.fixture(scope="module")
def exported(traced_toy, toy_layers, tmp_path_factory) -> tuple[Path, GraphIndex]:
    folder = tmp_path_factory.mktemp("once")
    return folder, export(folder, traced_toy, toy_layers, ROWS)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def places(path: Path) -> Counter:
    """Place in the weight file → constants that lie there."""
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(weight for tensor in initializers(graph) if (weight := weight_of(tensor)) is not None)


def run_all(folder: Path, index: GraphIndex, inputs: dict[str, Tensor], run_cpu) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every assignment, what its own graph gives and what the graph of all gives."""
    feed, together, pairs = {n: v.numpy() for n, v in inputs.items()}, index.find("cpu", None), []
    for assignment in sorted({g.assignment for g in index.graphs if g.assignment is not None}):
        own = index.find("cpu", assignment)
        scales = {s.name: np.asarray(0.02, np.float32) for s in own.scale_inputs.values()}
        others = {s.name: np.asarray(np.nan, np.float32) for s in together.scale_inputs.values()}
        both = {**feed, **others, **scales, "assignment": np.asarray(assignment, np.int32)}
        pairs.append((run_cpu(str(folder / own.path), {**feed, **scales}), run_cpu(str(folder / together.path), both)))
    return pairs


@pytest.mark.parametrize("rows", [ROWS, THREE, INT8], ids=["float", "three", "int8"])
def test_every_assignment_gives_what_its_own_graph_gives(
    traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path, rows
) -> None:
    index = export(tmp_path, traced_toy, toy_layers, rows, ("cpu",))
    pairs = run_all(tmp_path, index, toy_inputs, run_cpu)
    assert len(pairs) == len(set(rows))
    for own, together in pairs:
        if rows is INT8:  # whether ONNX Runtime adds the bias inside an integer product depends on what is around it
            assert np.median(np.abs(together - own)) < 1e-6 * own.std()
        else:
            np.testing.assert_array_equal(together, own)
    assert len({own.tobytes() for own, _ in pairs}) == len(pairs)


def test_a_weight_is_stored_once_whatever_reads_it(traced_toy, toy_layers, tmp_path) -> None:
    two = export(tmp_path / "two", traced_toy, toy_layers, [["fp8"] * 3, ["fp8a16"] * 3], ("target",))
    one = export(tmp_path / "one", traced_toy, toy_layers, [["fp8"] * 3] * 2, ("target",))
    assert two.weight_bytes == one.weight_bytes
    both, alone = (tmp_path / name / "switch.target.onnx" for name in ("two", "one"))
    assert places(both).keys() == places(alone).keys()
    # The tables by which the graph chooses between two assignments: one of two bytes.
    assert constant_bytes(both) - constant_bytes(alone) == 2


def test_branches_of_the_target_graph_share_places(exported) -> None:
    folder, index = exported
    read = places(folder / index.find("target", None).path)
    codes = {w: count for w, count in read.items() if w.dtype in (onnx.TensorProto.FLOAT8E4M3FN, 23)}
    up = next(count for weight, count in codes.items() if weight.shape == (128, 64))
    assert up == 2


def test_formats_that_share_a_weight_share_its_product_in_the_cpu_graph(exported) -> None:
    folder, index = exported
    path = folder / index.find("cpu", None).path
    assert set(places(path).values()) == {1}
    nodes = nodes_of(onnx.load(path, load_external_data=False).graph)
    products = Counter(node.name for node in nodes if node.op_type == "MatMul")
    layers = {"modulation/MatMul", "up/MatMul", "down/MatMul@nvfp4", "down/MatMul@fp8"}
    assert {name for name in products if not name.startswith("embed")} == layers
    assert set(products.values()) == {1}


def test_int8_weights_are_one_place_and_two_products(traced_toy, toy_layers, tmp_path) -> None:
    """An integer product, and one in float32 that ONNX Runtime must not make a product of 8-bit activations."""
    index = export(tmp_path, traced_toy, toy_layers, INT8, ("cpu",))
    path = tmp_path / index.find("cpu", None).path
    assert sorted(n for w, n in places(path).items() if w.dtype == onnx.TensorProto.INT8) == [1, 2, 2]
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in nodes_of(onnx.load(tmp_path / "optimized.onnx").graph))
    assert fused["MatMulIntegerToFloat"] == 2
    assert fused["MatMulNBits"] == 0


def test_int8_weights_with_float32_activations_are_pytorchs(toy, traced_toy, toy_layers, toy_inputs, run_cpu, tmp_path):
    index = export(tmp_path, traced_toy, toy_layers, [["w8a32"] * 3], ("cpu",))
    feed = {name: value.numpy() for name, value in toy_inputs.items()}
    got = run_cpu(str(tmp_path / index.find("cpu", 0).path), feed)
    weights = quantize(toy_layers, [["w8a32"]])["w8a32"]
    held = {name: layer.weight.detach().clone() for name, layer in toy_layers.items()}
    try:
        for name, layer in toy_layers.items():
            layer.weight.data = weights[name].codes * weights[name].scales
        with torch.no_grad():
            wanted = toy(**toy_inputs).numpy()
    finally:
        for name, layer in toy_layers.items():
            layer.weight.data = held[name]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_sixteen_bit_activations_are_the_activations_of_bf16(exported) -> None:
    """What `fp8a16` does to a layer's input is nothing in the target graph and one rounding in the cpu graph."""
    folder, index = exported
    target = onnx.load(folder / index.find("target", 1).path, load_external_data=False).graph
    assert not any(node.name.startswith(("up/Quantize", "down/Quantize")) for node in target.node)
    cpu = onnx.load(folder / index.find("cpu", 1).path, load_external_data=False).graph
    assert {"up/RoundInput", "down/RoundInput"} <= {node.name for node in cpu.node}
    grid = FORMATS["fp8a16"].activation
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize_activation(x, grid), x.bfloat16().float())


def test_weights_that_differ_in_spite_of_one_grid_are_refused(traced_toy, toy_layers, tmp_path) -> None:
    rows = [["fp8"] * 3, ["fp8", "fp8a16", "fp8"]]
    weights = quantize(toy_layers, rows)
    weights["fp8a16"]["up"] = quantize_nearest(-toy_layers["up"].weight.detach(), FORMATS["fp8a16"])
    policy = Policy.from_steps("toy", "0" * 64, list(toy_layers), rows)
    with pytest.raises(MismatchError, match="layer 'up': fp8 and fp8a16 have different weights"):
        export_graphs(traced_toy.clone(), policy, weights, tmp_path, "bfloat16", [], ("cpu",))


# ------------------------------------------------------------------------------------------------ the compiler


class Layer(nn.Module):
    """One linear layer and what makes its output no graph output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.up = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.transformer.up(x), approximate="tanh")


def plan_bytes(folder: Path, width: int, names: Sequence[str], target: str, layout) -> int:
    """Bytes of all plans and of the store of a layer in some formats, one assignment each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Layer(width).eval()
    inputs = {"x": torch.randn(4, 8, width, generator=torch.Generator().manual_seed(0))}
    traced = trace(module, inputs, "velocity", torch.bfloat16)
    index = export(folder / "onnx", traced, {"up": module.transformer.up}, [[n] for n in names], ("target",))
    plans = build_plans(folder, index, [TARGETS[target]], 8, layout=layout)
    store = folder / "plans" / STORE_NAME
    inside = sum(plan.unpacked_bytes or plan.bytes for plan in plans)
    return inside + (store.stat().st_size if layout == "shared" else 0)


@pytest.mark.parametrize("layout", ["switch", "shared"])
@pytest.mark.parametrize(
    ("names", "target", "bytes_per_weight"),
    [(("nvfp4", "nvfp4a16"), "sm120", 9 / 16), (("fp8", "fp8a16"), "sm120", 1.0), (("fp8", "fp8a16"), "sm89", 1.0)],
    ids=["nvfp4", "fp8-sm120", "fp8-sm89"],
)
def test_plans_hold_a_weight_once(tmp_path, names, target, bytes_per_weight, layout) -> None:
    """Measured by what wider layers add, since code of unknown size lies beside the weights."""
    narrow, wide = 1024, 2048
    sizes = [plan_bytes(tmp_path / str(width), width, names, target, layout) for width in (narrow, wide)]
    grown = (sizes[1] - sizes[0]) / (wide**2 - narrow**2)
    assert bytes_per_weight <= grown < 1.1 * bytes_per_weight

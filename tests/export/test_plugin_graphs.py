"""The graph of plugin nodes: ONNX Runtime on it against the fake-quantized PyTorch model, and what it stores."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.errors import MismatchError, UnsupportedFormatError
from adatsq_trt.export import export_plugin_graphs, trace
from adatsq_trt.export.plugin_function import PLUGIN_OP
from adatsq_trt.export.plugin_operands import plugin_operands, require_plugin_shapes
from adatsq_trt.formats import FORMATS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.packing import split_planes
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest, static_activation_scale
from tests.tiny_flux import make_tiny_flux

Runner = Callable[[str | bytes, Mapping[str, np.ndarray]], np.ndarray]
FORMATS_OF = {
    "bfloat16": ("w8a8", "w8a16", "w4a8", "int4wo", "fp8", "bf16"),
    "float16": ("w8a8", "w4a8", "fp8", "fp16"),
}
NESTED = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
ACTIVATION_SCALE = static_activation_scale(torch.tensor(6.0), FORMATS["fp8"].activation)


class Exported:
    """Every format alone and all of them mixed, in one folder."""

    def __init__(
        self, adapter: FluxAdapter, inputs: Mapping[str, Tensor], base: str, traced: ir.Model, folder: Path
    ) -> None:
        self.adapter, self.inputs, self.folder = adapter, inputs, folder
        self.layers = adapter.quantizable_layers()
        self.names = FORMATS_OF[base]
        dice = random.Random(0)
        rows = [*([name] * len(self.layers) for name in self.names), [dice.choice(self.names) for _ in self.layers]]
        self.policy = make_policy(self.layers, rows)
        self.weights = make_weights(self.layers, self.names)
        self.index = export_plugin_graphs(
            traced.clone(), self.policy, self.weights, folder, base, ["transformer_blocks.0"]
        )

    def feed(self, variant: str, assignment: int) -> dict[str, np.ndarray]:
        """Inputs of a graph, in its own types."""
        graph = self.index.find(variant, None)
        types = {"float": np.float32, "float16": np.float16}
        assert graph.selector_input is not None
        return {
            **{s.name: self.inputs[s.name].numpy().astype(types[s.dtype]) for s in graph.inputs},
            **{s.name: ACTIVATION_SCALE.numpy() for s in graph.scale_inputs.values()},
            graph.selector_input.name: np.zeros((1, assignment + 1), np.int32),
        }

    def simulated(self, assignment: int) -> np.ndarray:
        scales = {"fp8": ACTIVATION_SCALE.expand(1, len(self.layers))}
        formats = {layer: FORMATS[n] for layer, n in zip(self.layers, self.policy.assignments[assignment], strict=True)}
        with SimulatedModel(self.adapter, CandidateWeights(self.weights, scales)).installed() as model, torch.no_grad():
            model.assign(formats, 0)
            return self.adapter.predict(dict(self.inputs)).numpy()


def make_policy(layers: Mapping[str, nn.Linear], rows: Sequence[Sequence[str]]) -> Policy:
    return Policy.from_steps("small-flux", "0" * 64, list(layers), rows)


def make_weights(layers: Mapping[str, nn.Linear], names: Sequence[str]) -> dict[str, dict[str, QuantizedWeight]]:
    """Rounded to nearest; the nested layers' 4-bit codes are the high plane of their 8-bit ones."""
    weights = {
        name: {layer: quantize_nearest(module.weight.detach(), FORMATS[name]) for layer, module in layers.items()}
        for name in names
    }
    for layer in NESTED:
        codes = weights["w8a8"][layer].codes.clamp(-120, 119)
        scales = weights["w8a8"][layer].scales
        high = QuantizedWeight(split_planes(codes)[0], (16 * scales).repeat(1, codes.shape[1] // 64))
        wide = QuantizedWeight(codes, scales)
        weights |= {n: {**weights[n], layer: wide} for n in ("w8a8", "w8a16") if n in weights}
        weights |= {n: {**weights[n], layer: high} for n in ("w4a8", "int4wo") if n in weights}
    return weights


@pytest.fixture(scope="module")
def adapter() -> FluxAdapter:
    """Weights that both 16-bit types hold exactly: eight significant bits, none near the smallest float16."""
    flux = make_tiny_flux(width=64, patches=4)
    with torch.no_grad():
        for parameter in flux.transformer.parameters():
            parameter.copy_(parameter.bfloat16())
            parameter[parameter.abs() < 2**-10] = 0.0
    return flux


@pytest.fixture(scope="module")
def inputs(adapter: FluxAdapter) -> dict[str, Tensor]:
    latent = torch.randn(3, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return adapter.guided_inputs(latent, 0.75, adapter.encode([1, 2, 3]), 2.0)


@pytest.fixture(scope="module")
def traced(adapter, inputs) -> ir.Model:
    """In bfloat16."""
    return trace(adapter.trace_module(), inputs, "velocity", torch.bfloat16)


@pytest.fixture(scope="module")
def in_bfloat16(adapter, inputs, traced, tmp_path_factory) -> Exported:
    return Exported(adapter, inputs, "bfloat16", traced, tmp_path_factory.mktemp("bfloat16"))


@pytest.fixture(scope="module")
def in_float16(adapter, inputs, tmp_path_factory) -> Exported:
    traced = trace(adapter.trace_module(), inputs, "velocity", torch.float16)
    return Exported(adapter, inputs, "float16", traced, tmp_path_factory.mktemp("float16"))


@pytest.mark.parametrize("assignment", range(7), ids=[*FORMATS_OF["bfloat16"], "mixed"])
def test_every_profile_is_the_fake_quantized_model(in_bfloat16: Exported, run_cpu: Runner, assignment: int) -> None:
    """The tolerance of the other cpu graphs: float32 sums in another order flip a few codes by one step."""
    path = in_bfloat16.folder / in_bfloat16.index.find("cpu", None).path
    got, wanted = run_cpu(str(path), in_bfloat16.feed("cpu", assignment)), in_bfloat16.simulated(assignment)
    error = np.abs(got - wanted) / wanted.std()
    assert np.quantile(error, 0.5) < 2e-5
    assert error.max() < 2e-3


@pytest.mark.parametrize("assignment", range(5), ids=[*FORMATS_OF["float16"], "mixed"])
def test_onnx_runtime_runs_the_very_file_of_tensorrt(in_float16: Exported, run_cpu: Runner, assignment: int) -> None:
    """In float16, for which ONNX Runtime has CPU kernels.

    The trunk rounds to 11 bits after every operator, 2^-12 of a value each; some 64 of them add up like a random walk
    (engines/accuracy/tolerances.py), and flips of int8 codes add about as much again.
    """
    path = in_float16.folder / in_float16.index.find("target", None).path
    got = run_cpu(str(path), in_float16.feed("target", assignment)).astype(np.float32)
    wanted = in_float16.simulated(assignment)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 2 * 64**0.5 * 2.0**-12


def nodes_of(exported: Exported, path: str) -> dict[str, onnx.NodeProto]:
    graph = onnx.load(exported.folder / path, load_external_data=False).graph
    return {node.name.partition("/")[0]: node for node in graph.node if node.op_type == PLUGIN_OP}


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_a_node_is_what_the_library_reads(in_bfloat16: Exported) -> None:
    nodes = nodes_of(in_bfloat16, in_bfloat16.index.find("target", None).path)
    assert set(nodes) == set(in_bfloat16.layers)
    got = attributes(nodes["transformer_blocks.0.attn.to_q"])
    assert got["plugin_namespace"] == b"adatsq"
    assert got["plugin_version"] == b"1"
    assert got["group_size"] == 64
    assert got["profiles"].decode().split(",")[:6] == list(FORMATS_OF["bfloat16"])
    assert got["inputs"] == b"x,selector,bias,w4,w4_scale,lo,w8_scale,w_fp8,w_fp8_scale,w16,x_fp8_scale"


def test_nested_layers_have_planes_and_others_two_copies(in_bfloat16: Exported) -> None:
    for layer, node in nodes_of(in_bfloat16, in_bfloat16.index.find("target", None).path).items():
        names = set(attributes(node)["inputs"].decode().split(","))
        assert ("lo" in names) == (layer in NESTED)
        assert ("w8" in names) == (layer not in NESTED)


def test_only_formats_that_a_layer_uses_are_stored(adapter, traced, tmp_path) -> None:
    """Distinct bytes of the weight inputs: the planes of a nested layer once, for both widths."""
    layers = adapter.quantizable_layers()
    names = list(layers)
    rows = [["w8a8"] * len(names), ["w4a8" if layer in NESTED else "w8a8" for layer in names]]
    weights = make_weights(layers, ("w8a8", "w4a8"))
    index = export_plugin_graphs(traced.clone(), make_policy(layers, rows), weights, tmp_path, "bfloat16", [])
    model = onnx.load(tmp_path / index.find("target", None).path, load_external_data=False)
    stored = {tensor.name: np.prod(tensor.dims) * (1 if tensor.data_type == onnx.TensorProto.INT8 else 4)
              for tensor in model.graph.initializer if any(tensor.name.startswith(f"{n}.") for n in names)
              and tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT)}  # fmt: skip
    for layer, module in layers.items():
        own = sum(size for name, size in stored.items() if name.rpartition(".")[0] == layer)
        rows_, width = module.weight.shape
        scales = 4 * rows_ * (1 + width // 64 if layer in NESTED else 1)
        assert own == rows_ * width + scales


def test_the_plain_file_has_no_functions_and_the_same_nodes(in_bfloat16: Exported) -> None:
    graph = in_bfloat16.index.find("target", None)
    with_functions, plain = (
        onnx.load(in_bfloat16.folder / p, load_external_data=False) for p in (graph.path, graph.plain_path)
    )
    assert not plain.functions
    assert with_functions.graph == plain.graph
    assert {(f.domain, f.name, f.overload) for f in with_functions.functions} == {
        (node.domain, node.op_type, node.overload) for node in plain.graph.node if node.op_type == PLUGIN_OP
    }


def test_tensorrts_parser_prefers_the_plugin_to_the_function(in_bfloat16: Exported) -> None:
    """TensorRT-RTX has enterprise TensorRT's parser; a creator writes down what it is asked for, and declines."""
    trt = pytest.importorskip("tensorrt_rtx")
    asked: dict[str, dict[str, object]] = {}

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "AdatsqLinear", "1", "adatsq"
            kinds = {"profiles": "CHAR", "inputs": "CHAR", "group_size": "INT32"}
            empty = np.array([], np.int8)
            fields = [trt.PluginField(n, empty, getattr(trt.PluginFieldType, kind)) for n, kind in kinds.items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name, fields, _phase):
            asked[name] = {field.name: np.array(field.data) for field in fields}

    registry, creator = trt.get_plugin_registry(), Creator()
    builder = trt.Builder(logger := trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    graph = in_bfloat16.index.find("target", None)
    assert registry.register_creator(creator, "adatsq")
    try:
        assert not parser.parse_from_file(str(in_bfloat16.folder / graph.path))
    finally:
        registry.deregister_creator(creator)
    ((name, fields),) = asked.items()
    assert "Could not create the plugin" in parser.get_error(0).desc()
    node = attributes(nodes_of(in_bfloat16, graph.path)[name.partition("/")[0]])
    for text in ("profiles", "inputs"):
        assert fields[text].tobytes().rstrip(b"\0") == node[text]
    assert fields["group_size"].tolist() == [64]


def test_the_selector_is_an_input_of_its_own(in_bfloat16: Exported) -> None:
    for variant in ("target", "cpu"):
        graph = in_bfloat16.index.find(variant, None)
        assert (graph.selector_input.dtype, graph.selector_input.shape) == ("int32", (1, "assignment"))
        assert "selector" not in [s.name for s in graph.inputs]
        assert set(graph.scale_inputs) == set(in_bfloat16.layers)


def test_what_the_kernels_cannot_hold_is_refused(adapter, traced, tmp_path) -> None:
    layers = adapter.quantizable_layers()

    def export(names: Sequence[str], weights: Mapping[str, Mapping[str, QuantizedWeight]]) -> GraphIndex:
        policy = make_policy(layers, [[name] * len(layers) for name in names])
        return export_plugin_graphs(traced.clone(), policy, weights, tmp_path / "export", "bfloat16", [])

    with pytest.raises(UnsupportedFormatError, match="no kernel for nvfp4, w3a3; choose among"):
        export(["nvfp4", "w3a3", "bf16"], {})
    with pytest.raises(UnsupportedFormatError, match="fp16 and bf16, expected one of them"):
        export(["fp16", "bf16"], {})
    with pytest.raises(MismatchError, match="no weight in format 'w8a8'"):
        export(["w8a8"], {})
    assert not (tmp_path / "export").exists()


def test_a_layer_of_odd_shape_is_refused() -> None:
    require_plugin_shapes({"ff": (32, 48)})
    with pytest.raises(UnsupportedFormatError, match=r"layer 'ff': got 40 inputs and 32 outputs, .* multiples of 16"):
        require_plugin_shapes({"ff": (32, 40)})


@pytest.mark.parametrize("names", [("w4a8", "int4wo"), ("w8a8", "w8a16")])
def test_two_formats_of_one_grid_must_agree(names: tuple[str, str]) -> None:
    codes, scales = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1)
    weights = {name: QuantizedWeight(codes + i, scales) for i, name in enumerate(names)}
    with pytest.raises(MismatchError, match=f"layer 'ff': {names[0]} and {names[1]} have different weights"):
        plugin_operands("ff", weights)
    rescaled = {name: QuantizedWeight(codes, scales * (1 + i)) for i, name in enumerate(names)}
    with pytest.raises(MismatchError, match="have different weights"):
        plugin_operands("ff", rescaled)


def test_eight_bit_formats_share_an_operand() -> None:
    weight = QuantizedWeight(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1))
    assert list(plugin_operands("ff", {"w8a16": weight, "w8a8": weight})) == ["w8", "w8_scale"]

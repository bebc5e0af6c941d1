"""Z-Image, Wan and Qwen-Image through trace, Q/DQ, ONNX Runtime and TensorRT-RTX, as Flux in the other tests."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from adatsq_trt.calibration.clips import scale_with
from adatsq_trt.engines.accuracy.block_cut import GraphView, find_cut, find_pieces
from adatsq_trt.engines.accuracy.reference_ops import OPERATORS
from adatsq_trt.engines.accuracy.rounded_layers import count_rounded_layers
from adatsq_trt.engines.build import build_plans
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.capture import captured
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest
from tests.export.separated import require_equal_layers
from tests.tiny_hunyuan_video import make_tiny_hunyuan_video
from tests.tiny_qwen_image import make_tiny_qwen_image
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image, make_z_image_of_several_lengths

MAKERS = {
    "z-image": make_tiny_z_image,
    "z-image-captions": make_z_image_of_several_lengths,
    "wan": make_tiny_wan,
    "qwen-image": make_tiny_qwen_image,
    "hunyuan-video": make_tiny_hunyuan_video,
}
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow if name == "hunyuan-video" else ()) for name in MAKERS]
# Last layer of a block's main stream → layers in a row behind it that round.
ROUNDED = {"ZImageTransformer2DModel": ("feed_forward.w2", 7), "WanTransformer3DModel": ("ffn.net.2", 6)}
ROUNDED["QwenImageTransformer2DModel"] = ("img_mlp.net.2", 4)
ROUNDED["HunyuanVideo15Transformer3DModel"] = ("ff.net.2", 4)
BLACKWELL = ("nvfp4", "fp8", "bf16", "int4wo")
ROWS = {"target": [("fp8",), BLACKWELL], "cpu": [tuple(FORMATS)]}  # formats of an assignment, in turn over the layers
Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=PARAMETERS)
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def inputs(adapter: ModelAdapter) -> Inputs:
    latent = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return adapter.guided_inputs(latent, 0.7, adapter.encode([0, 2]), 2.0)


@pytest.fixture(scope="module")
def store(adapter: ModelAdapter, inputs: Inputs) -> CandidateWeights:
    layers = adapter.quantizable_layers()
    weights = {
        name: {layer: quantize_nearest(module.weight.detach(), fmt) for layer, module in layers.items()}
        for name, fmt in FORMATS.items()
    }
    with captured(layers) as capture, torch.no_grad():
        adapter.predict(inputs)
    largest = torch.stack([capture.inputs[layer].abs().amax() for layer in layers])
    scaled = {name: fmt for name, fmt in FORMATS.items() if fmt.scaled_activation}
    return CandidateWeights(weights, {n: scale_with(0.75, largest, f.activation)[None] for n, f in scaled.items()})


@pytest.fixture(scope="module")
def traced(adapter: ModelAdapter, inputs: Inputs) -> ir.Model:
    """With another number of rows than the graphs will run with."""
    example = {name: value[:3] for name, value in inputs.items()}
    return trace(adapter.trace_module(), example, "velocity", torch.bfloat16, adapter.float32_inputs)


@pytest.fixture(scope="module", params=ROWS)
def exported(
    request: pytest.FixtureRequest, traced, adapter, store, tmp_path_factory
) -> tuple[Path, GraphIndex, Policy]:
    """Target graphs with the cpu graphs made of them; cpu graphs alone with every format that there is."""
    layers, folder = list(adapter.quantizable_layers()), tmp_path_factory.mktemp("bundle")
    rows = [[names[i % len(names)] for i in range(len(layers))] for names in ROWS[request.param]]
    policy = Policy.from_steps("tiny", "0" * 64, layers, rows)
    variants = ("target", "cpu") if request.param == "target" else ("cpu",)
    graphs = traced.clone()
    index = export_graphs(graphs, policy, store.weights, folder / "onnx", "bfloat16", adapter.blocks(), variants)
    return folder, index, policy


@contextmanager
def layer_outputs(adapter: ModelAdapter, layers: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Filled by the next run of the model: module path → output of the layer."""
    outputs: dict[str, np.ndarray] = {}
    with ExitStack() as hooks:
        for name in layers:
            layer = adapter.transformer.get_submodule(name)
            keep = layer.register_forward_hook(lambda _, _args, out, name=name: outputs.update({name: out.numpy()}))
            hooks.callback(keep.remove)
        yield outputs


def test_check_computes_every_16_bit_sum_of_the_graphs_in_float32(traced) -> None:
    """onnx's evaluator sums in the type of its inputs, but for products of matrices."""
    wide = {operator.__name__ for operator in OPERATORS}
    sums = re.compile(r"Reduce(?!Max|Min).*|.*(Softmax|Normalization|Pool)|CumSum|Einsum|Conv|Sum|Mean")
    of_16_bits = {n.op_type for n in traced.graph if n.outputs[0].dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)}
    assert {name for name in of_16_bits if sums.fullmatch(name)} <= wide
    assert wide & of_16_bits


def test_cpu_graphs_are_the_fake_quantized_model(exported, adapter, store, inputs) -> None:
    """In pieces: in a whole graph attention hands a value that rounds the other way on to everything."""
    folder, index, policy = exported
    for number, row in enumerate(policy.assignments):
        graph = index.find("cpu", number)
        formats = {layer: FORMATS[name] for layer, name in zip(policy.layers, row, strict=True)}
        feed = {name: value.numpy() for name, value in inputs.items()}
        for place, (layer, fmt) in enumerate(formats.items()):
            if fmt.scaled_activation:
                feed[graph.scale_inputs[layer].name] = store.scales[fmt.name][0, place].numpy()
        with SimulatedModel(adapter, store).installed() as model, torch.no_grad():
            model.assign(formats, 0)
            with layer_outputs(adapter, policy.layers) as outputs:
                wanted = adapter.predict(inputs).numpy()
        widths = {layer: (formats[layer], linear.in_features) for layer, linear in adapter.quantizable_layers().items()}
        output = (graph.outputs[0].name, wanted)
        require_equal_layers(folder / "onnx" / graph.path, feed, outputs, output, widths)


def test_the_reference_is_the_full_precision_model(exported, adapter, inputs, run_cpu) -> None:
    folder, index, _ = exported
    got = run_cpu(str(folder / "onnx" / index.find("reference", None).path), {n: v.numpy() for n, v in inputs.items()})
    with torch.no_grad():
        wanted = adapter.predict(inputs).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_graphs_have_neither_complex_nor_double_numbers_nor_scatters(traced: ir.Model) -> None:
    proto = ir.to_proto(traced)
    types = {value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input)}
    assert not types & {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    assert not {node.op_type for node in proto.graph.node} & {"ScatterND", "ScatterElements", "Loop", "If"}


def test_the_time_has_more_than_eight_bits_in_target_graphs(exported) -> None:
    _, index, _ = exported
    kinds = {signature.name: signature.dtype for graph in index.graphs for signature in graph.inputs}
    assert kinds["timestep"] == "float"


@pytest.mark.parametrize("exported", ["target"], indirect=True)
def test_blocks_have_the_same_border_in_both_variants(exported, adapter) -> None:
    """As `check` compares them; in Wan's target graphs a block ends in a Cast that cpu graphs do not have."""
    folder, index, policy = exported
    for number in range(len(policy.assignments)):
        target, cpu = (GraphView(folder / "onnx" / index.find(variant, number).path) for variant in ("target", "cpu"))
        pieces = {piece.name: piece for piece in find_pieces(target, cpu, adapter.blocks())}
        for block in adapter.blocks():
            cut = find_cut(target, cpu, pieces[block])
            last = [layer for layer in policy.layers if layer.startswith(f"{block}.")][-1]
            upstream = target.extract([], cut.outputs)
            assert any(f"{last}.output" in node.output for node in upstream.graph.node)


@pytest.mark.parametrize("exported", ["target"], indirect=True)
def test_rounded_layers_in_a_block(exported, adapter) -> None:
    """Z-Image's gate has three layers before either factor; Wan's two attentions and network are six in a row.

    Qwen-Image's attention and network are four, as Flux's.
    """
    folder, index, policy = exported
    target = GraphView(folder / "onnx" / index.find("target", 1).path)
    last, expected = ROUNDED[adapter.architecture]
    for block in adapter.blocks():
        counts = count_rounded_layers(target, [layer for layer in policy.layers if layer.startswith(f"{block}.")])
        assert counts[f"{block}.{last}.output"] == max(counts.values()) == expected


@pytest.mark.parametrize("exported", ["target"], indirect=True)
def test_target_graphs_compile(exported) -> None:
    folder, index, policy = exported
    plans = build_plans(folder, index, [TARGETS["sm120"]], 4)
    assert [plan.assignment for plan in plans] == list(range(len(policy.assignments)))
    assert all(plan.bytes > 100_000 for plan in plans)

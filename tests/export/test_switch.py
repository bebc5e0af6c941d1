"""The graph of all assignments computes what each assignment's own graph computes, and holds every weight once."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.errors import AdatsqError
from adatsq_trt.export import export_graphs
from adatsq_trt.export.switch import switch
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest

# "modulation" never changes, "up" has two formats, "down" three.
ROWS = [("fp8", "fp8", "nvfp4"), ("fp8", "bf16", "fp8"), ("fp8", "fp8", "bf16"), ("fp8", "bf16", "bf16")]


@pytest.fixture(scope="module")
def exported(traced_toy, toy_layers, tmp_path_factory) -> tuple[Path, GraphIndex]:
    folder = tmp_path_factory.mktemp("switch")
    policy = Policy.from_steps("toy", "0" * 64, list(toy_layers), ROWS)
    weights = {
        name: {layer: quantize_nearest(m.weight.detach(), FORMATS[name]) for layer, m in toy_layers.items()}
        for name in ("nvfp4", "fp8", "bf16")
    }
    return folder, export_graphs(traced_toy.clone(), policy, weights, folder, "bfloat16", [], ("target", "cpu"))


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from subgraphs(attribute.g)


@pytest.mark.parametrize("assignment", range(len(ROWS)))
def test_bucket_selects_the_assignment(exported, toy_inputs, run_cpu, assignment):
    folder, index = exported
    own, together = index.find("cpu", assignment), index.find("cpu", None)
    feed = {name: value.numpy() for name, value in toy_inputs.items()}
    scales = {signature.name: np.asarray(0.02, np.float32) for signature in own.scale_inputs.values()}
    wanted = run_cpu(str(folder / own.path), {**feed, **scales})
    # A scale that belongs to no format of this assignment must not matter.
    others = {s.name: np.asarray(np.nan, np.float32) for s in together.scale_inputs.values() if s.name not in scales}
    feed |= {**scales, **others, "assignment": np.asarray(assignment, np.int32)}
    np.testing.assert_array_equal(run_cpu(str(folder / together.path), feed), wanted)


def test_signature(exported):
    _, index = exported
    together = index.find("target", None)
    assert (together.assignment_input.name, together.assignment_input.dtype, together.assignment_input.shape) == (
        "assignment",
        "int32",
        (),
    )
    assert [signature.name for signature in together.inputs] == ["x", "condition"]
    assert {layer: s.dtype for layer, s in together.scale_inputs.items()} == dict.fromkeys(
        ("modulation", "up", "down"), "float"
    )


@pytest.mark.parametrize("variant", ["target", "cpu"])
def test_every_weight_and_every_product_is_there_once(exported, variant):
    folder, index = exported
    graphs = list(subgraphs(onnx.load(folder / index.find(variant, None).path, load_external_data=False).graph))
    read = Counter(
        next(entry.value for entry in tensor.external_data if entry.key == "offset")
        for graph in graphs
        for tensor in graph.initializer
        if tensor.external_data
    )
    assert set(read.values()) == {1}
    products = Counter(node.name for graph in graphs for node in graph.node if node.op_type == "MatMul")
    names = {"up": ["fp8", "bf16"], "down": ["nvfp4", "fp8", "bf16"]}
    branches = {f"{layer}/MatMul@{name}" for layer, formats in names.items() for name in formats}
    assert {name for name in products if "@" in name} == branches
    assert set(products.values()) == {1}


def test_onnx_runtime_fuses_integer_products_in_branches(traced_toy, toy_layers, tmp_path):
    names = ("w8a8s", "fp32")
    weights = {
        name: {layer: quantize_nearest(m.weight.detach(), FORMATS[name]) for layer, m in toy_layers.items()}
        for name in names
    }
    policy = Policy.from_steps("toy", "0" * 64, list(toy_layers), [[name] * 3 for name in names])
    index = export_graphs(traced_toy.clone(), policy, weights, tmp_path, "bfloat16", [], ("cpu",))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / index.find("cpu", None).path, options, providers=["CPUExecutionProvider"])
    graphs = subgraphs(onnx.load(tmp_path / "optimized.onnx").graph)
    fused = Counter(node.op_type for graph in graphs for node in graph.node)
    # The third has an input of two dimensions: its product and bias become a Gemm first, with or without a choice.
    assert fused["MatMulIntegerToFloat"] == 2


def test_no_choice_stands_inside_another(exported):
    folder, index = exported
    trunk, *branches = subgraphs(onnx.load(folder / index.find("target", None).path, load_external_data=False).graph)
    assert sum(node.op_type == "If" for node in trunk.node) == 1 + 3
    assert not any(node.op_type == "If" for graph in branches for node in graph.node)


def test_tensorrt_compiles_it(exported):
    folder, index = exported
    path = folder / index.find("target", None).path
    assert len(RtxBackend().build(path, TARGETS["sm120"], BatchRange(1, 4, 8))) > 1000


def test_without_a_choice_there_is_no_input_for_it(traced_toy, toy_layers, tmp_path):
    weights = {"fp8": {layer: quantize_nearest(m.weight, FORMATS["fp8"]) for layer, m in toy_layers.items()}}
    policy = Policy.from_steps("toy", "0" * 64, list(toy_layers), [["fp8"] * 3] * 2)
    index = export_graphs(traced_toy.clone(), policy, weights, tmp_path, "bfloat16", [], ("cpu",))
    assert index.find("cpu", None).assignment_input is None
    assert index.find("cpu", None).inputs == index.find("cpu", 0).inputs


def test_a_layer_that_gives_two_values_is_refused():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n,2] x) => (float[n,2] y) {
        a = Neg(x)
        b = Abs(a)
        y = Add(a, b)
    }"""
    model = ir.from_onnx_text(text)
    for node in list(model.graph)[:2]:
        node.metadata_props["adatsq.module"] = "up"
    with pytest.raises(AdatsqError, match="layer 'up' gives 2 values"):
        switch([model, model], ["up"], [["fp8"], ["bf16"]], constants_outside=False)

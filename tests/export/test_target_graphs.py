"""Target graphs compile with TensorRT-RTX, and onnx's own evaluator gives the numbers of the formats."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from adatsq_trt.export import export_graphs, trace
from adatsq_trt.export.graphs import BaseName
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import (
    dequantize_weight,
    fake_quantize_activation,
    quantize_nearest,
    round_e2m1,
    round_e4m3,
    static_activation_scale,
)

CASES = [
    ("bfloat16", ("nvfp4", "fp8", "bf16"), ("SM120",), 23),
    ("bfloat16", ("int4wo", "fp8", "bf16"), ("SM89", "SM120"), 21),
    ("float16", ("int4wo", "fp16", "int4wo"), ("SM80", "SM86"), 21),
]


@pytest.fixture(scope="module")
def export_toy(toy, toy_inputs, toy_layers, traced_toy, tmp_path_factory):
    traces = {"bfloat16": traced_toy}

    def export(base: BaseName, row: tuple[str, ...]) -> str:
        if base not in traces:
            traces[base] = trace(toy, toy_inputs, "velocity", getattr(torch, base))
        weights = {
            name: {layer: quantize_nearest(m.weight.detach(), FORMATS[name]) for layer, m in toy_layers.items()}
            for name in row
        }
        folder = tmp_path_factory.mktemp("target")
        policy = Policy.from_steps("toy", "0" * 64, list(toy_layers), [row])
        index = export_graphs(traces[base].clone(), policy, weights, folder, base, [], ("target",))
        return str(folder / index.find("target", 0).path)

    return export


def build(path: str, target: str) -> int:
    """Bytes of the plan, or the compiler's complaint."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(path), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        rest = list(tensor.shape)[1:]
        if len(tensor.shape):
            profile.set_shape(tensor.name, [1, *rest], [4, *rest], [8, *rest])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"TensorRT-RTX refused {path} for {target}"
    return int(plan.nbytes)


@pytest.mark.parametrize(("base", "row", "targets", "opset"), CASES)
def test_target_graphs_compile(export_toy, base, row, targets, opset):
    path = export_toy(base, row)
    assert onnx.load(path, load_external_data=False).opset_import[0].version == opset
    assert all(build(path, target) > 0 for target in targets)


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801
    """What TensorRT documents of the operator, for the last axis; the elements as float32 instead of codes."""

    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, scale_type=None):
        blocks = torch.tensor(np.asarray(x, np.float32)).reshape(*x.shape[:-1], -1, block_size)
        steps = round_e4m3(blocks.abs().amax(-1) / (6 * float(scale)))
        divisor = torch.where(steps > 0, steps, 1.0) * float(scale)
        return round_e2m1(blocks / divisor[..., None]).reshape(x.shape).numpy(), steps.numpy()


class DequantizeFloat(OpRun):
    """DequantizeLinear of what the operator above returns; the result has the type of the scale."""

    op_domain = "trt"

    def _run(self, elements, scale, axis=None, block_size=None):
        wide = np.asarray(scale, np.float32)
        values = elements * (wide if block_size is None else wide.repeat(block_size, axis=-1))
        return (values.astype(scale.dtype),)


def cut_layer(path: str, layer: str) -> tuple[onnx.ModelProto, str]:
    """One layer of a target graph as a model of its own, and the name of its input."""
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.name.startswith(f"{layer}/")]
    dynamic = {name for node in nodes if node.op_type == "TRT_FP4DynamicQuantize" for name in node.output}
    for node in nodes:
        if node.op_type == "DequantizeLinear" and dynamic & set(node.input):
            node.op_type, node.domain = "DequantizeFloat", "trt"
    read, made = {name for node in nodes for name in node.input}, {name for node in nodes for name in node.output}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    scales = [value for value in model.graph.input if value.name in read]
    (source,) = read - made - {value.name for value in [*constants, *scales]}
    bfloat16 = onnx.TensorProto.BFLOAT16
    graph = onnx.helper.make_graph(
        nodes,
        layer,
        [onnx.helper.make_tensor_value_info(source, bfloat16, None), *scales],
        [onnx.helper.make_tensor_value_info(f"{layer}.output", bfloat16, None)],
        constants,
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), source


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4wo", "nvfp4", "w8a8s"])
def test_a_target_layer_computes_what_its_format_says(export_toy, toy_inputs, toy_layers, name):
    """One layer of the target graph in onnx's evaluator, in bfloat16, against the tensor functions."""
    layer, fmt = toy_layers["up"], FORMATS[name]
    block, source = cut_layer(export_toy("bfloat16", ("bf16", name, "bf16")), "up")
    x = toy_inputs["x"].bfloat16().float()
    feed = {source: x.numpy().astype(ml_dtypes.bfloat16)}
    scale = static_activation_scale(x.abs().amax(), fmt.activation) if fmt.static_activation else None
    if scale is not None:
        feed["up.activation_scale"] = np.asarray(scale.item(), np.float32)
    (got,) = ReferenceEvaluator(block, new_ops=[TRT_FP4DynamicQuantize, DequantizeFloat]).run(None, feed)
    weight = dequantize_weight(quantize_nearest(layer.weight.detach(), fmt), fmt)
    with torch.no_grad():
        linear = torch.nn.functional.linear
        wanted = linear(fake_quantize_activation(x, fmt.activation, scale), weight, layer.bias).numpy()
        plain = linear(x, layer.weight, layer.bias).numpy()
    error = np.square(np.asarray(got, np.float32) - wanted).mean()
    # The evaluator rounds every partial sum to bfloat16. That must stay below what the format itself costs.
    assert error < (2**-6) ** 2 * np.square(wanted).mean()
    assert name in ("bf16", "w8a8s") or error < 0.5 * np.square(plain - wanted).mean()

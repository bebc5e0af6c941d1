"""Storage in TensorRT-RTX of one weight that quantized and 16-bit activations share: weights_once.json and a table.

    python -m benchmarks.size.weights_once [--document docs/decisions/0043-weights-once-in-plans.md]

A layer y = x Wᵀ in float16, its weight on each grid as the exporter writes it, compiled without a GPU: alone, its input
in 16 bits or quantized, and as two branches of an `If` that choose between them. The weight is a constant in each
branch, a constant outside of the `If`, or an input of the network. Activation scales are inputs, as in all graphs that
are exported, or constants. Two widths tell what grows with the weight from what does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto
from onnx import helper as h
from onnx.numpy_helper import from_array
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import write_json_model
from adatsq_trt.formats import FORMATS, TARGETS, Grid
from adatsq_trt.packing import pack_nibbles
from adatsq_trt.quantizers import quantize_nearest
from benchmarks.document import replace_marked

RESULTS = Path(__file__).with_name("weights_once.json")
WIDTHS, ROWS, BLOCK = (1024, 2048), 64, 16
TARGET_NAMES = ("sm89", "sm120")
Weight = Literal["in each branch", "outside", "input"]
FORMS: tuple[tuple[str, Weight, bool], ...] = (
    ("16 bits", "outside", False),
    ("quantized", "outside", False),
    ("16 bits", "input", False),
    ("quantized", "input", False),
    ("both", "in each branch", False),
    ("both", "in each branch", True),
    ("both", "outside", False),
    ("both", "input", False),
)
SCALE = "x_scale"


@dataclass(frozen=True)
class Layer:
    """A weight and what its input is quantized to.

    Attributes:
        grid: name of the weight's grid.
        width: N and K.
        weight: its constants, large ones first.
        dequantize: nodes from them to "<prefix>w", [N, K] float16.
        quantize: nodes from x and "x_scale" to "<prefix>x", and their constants.
    """

    grid: str
    width: int
    weight: tuple[TensorProto, ...]
    dequantize: Callable[[str], list[NodeProto]]
    quantize: Callable[[str], tuple[list[NodeProto], list[TensorProto]]]


class Row(BaseModel):
    """A compilation.

    Attributes:
        grid: of the weight.
        activations: of the layer's input: "16 bits", "quantized", or "both" for two branches.
        weight: its place in the network.
        constant_scales: whether activation scales are constants.
        target: name.
        plan_bytes: of the plans of both widths; None where the compiler refuses them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: str
    activations: str
    weight: str
    constant_scales: bool
    target: str
    plan_bytes: tuple[int, int] | None

    @property
    def bytes_per_weight(self) -> float | None:
        """Growth of the plan per weight."""
        if self.plan_bytes is None:
            return None
        return (self.plan_bytes[1] - self.plan_bytes[0]) / (WIDTHS[1] ** 2 - WIDTHS[0] ** 2)


class Results(BaseModel):
    """Content of weights_once.json.

    Attributes:
        version: of TensorRT-RTX.
        bytes_per_weight: grid → of one copy, scales included.
        rows: every compilation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    version: str
    bytes_per_weight: dict[str, float]
    rows: tuple[Row, ...]


# ------------------------------------------------------------------------------------------------------ layers


def make_layers(width: int) -> list[Layer]:
    """The same random weight on every grid."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    kinds = {
        "nvfp4": (TensorProto.FLOAT4E2M1, BLOCK, _quantize_blocks),
        "fp8": (TensorProto.FLOAT8E4M3FN, 0, lambda p: _quantize_tensor(p, TensorProto.FLOAT8E4M3FN)),
        "int8": (TensorProto.INT8, 0, lambda p: _quantize_tensor(p, TensorProto.INT8)),
        "int4": (TensorProto.INT4, 64, lambda p: _quantize_tensor(p, TensorProto.INT8)),
    }
    formats = {"nvfp4": "nvfp4", "fp8": "fp8", "int8": "w8a8s", "int4": "int4wo"}
    return [_layer(name, weight, formats[name], *kind) for name, kind in kinds.items()]


def _layer(
    grid: str,
    weight: Tensor,
    format_name: str,
    kind: int,
    block: int,
    quantize: Callable[[str], tuple[list[NodeProto], list[TensorProto]]],
) -> Layer:
    fmt = FORMATS[format_name]
    quantized = quantize_nearest(weight, fmt)
    assert quantized.scales is not None
    codes = pack_nibbles(quantized.codes) if fmt.weight.bits == 4 else quantized.codes
    constants = [_raw("codes", codes, kind, tuple(weight.shape))]
    if quantized.global_scale is not None:
        constants.append(_raw("scales", quantized.scales, TensorProto.FLOAT8E4M3FN, tuple(quantized.scales.shape)))
        constants.append(from_array(quantized.global_scale.numpy(), "global_scale"))
    else:
        scales = (quantized.scales if block else quantized.scales[:, 0]).half().numpy()
        constants.append(from_array(scales, "scales"))
    return Layer(grid, len(weight), tuple(constants), lambda prefix: _dequantize(prefix, fmt.weight, block), quantize)


def _raw(name: str, content: Tensor, kind: int, shape: tuple[int, ...]) -> TensorProto:
    content_bytes = content.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=content_bytes)


def _dequantize(prefix: str, grid: Grid, block: int) -> list[NodeProto]:
    axis: dict[str, int] = {"axis": 1, "block_size": block} if block else {"axis": 0}
    if grid is not FORMATS["nvfp4"].weight:
        return [h.make_node("DequantizeLinear", ["codes", "scales"], [f"{prefix}w"], f"{prefix}dq", **axis)]
    wide, narrow = f"{prefix}wide", f"{prefix}narrow"
    return [
        h.make_node("DequantizeLinear", ["scales", "global_scale"], [wide], f"{prefix}dqs"),
        h.make_node("Cast", [wide], [narrow], f"{prefix}cast", to=TensorProto.FLOAT16),
        h.make_node("DequantizeLinear", ["codes", narrow], [f"{prefix}w"], f"{prefix}dq", **axis),
    ]


def _quantize_tensor(prefix: str, kind: int) -> tuple[list[NodeProto], list[TensorProto]]:
    scale, zero, codes = f"{prefix}scale", f"{prefix}zero", f"{prefix}q"
    nodes = [
        h.make_node("Cast", [SCALE], [scale], f"{prefix}cast_scale", to=TensorProto.FLOAT16),
        h.make_node("QuantizeLinear", ["x", scale, zero], [codes], f"{prefix}qx"),
        h.make_node("DequantizeLinear", [codes, scale], [f"{prefix}x"], f"{prefix}dqx"),
    ]
    return nodes, [h.make_tensor(zero, kind, [], [0])]


def _quantize_blocks(prefix: str) -> tuple[list[NodeProto], list[TensorProto]]:
    one, wide, scaled, codes = f"{prefix}one", f"{prefix}x_wide", f"{prefix}scaled", f"{prefix}q"
    blocks, wide_blocks, narrow = f"{prefix}qs", f"{prefix}qs_wide", f"{prefix}qs_narrow"
    dynamic = {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
    nodes = [
        h.make_node("Cast", ["x"], [wide], f"{prefix}widen", to=TensorProto.FLOAT),
        h.make_node("Div", [wide, SCALE], [scaled], f"{prefix}divide"),
        h.make_node("TRT_FP4DynamicQuantize", [scaled, one], [codes, blocks], f"{prefix}qx", domain="trt", **dynamic),
        h.make_node("DequantizeLinear", [blocks, SCALE], [wide_blocks], f"{prefix}dqxs"),
        h.make_node("Cast", [wide_blocks], [narrow], f"{prefix}castx", to=TensorProto.FLOAT16),
        h.make_node("DequantizeLinear", [codes, narrow], [f"{prefix}x"], f"{prefix}dqx", axis=-1, block_size=BLOCK),
    ]
    return nodes, [h.make_tensor(one, TensorProto.FLOAT, [], [1.0])]


# ------------------------------------------------------------------------------------------------------ graphs


def _product(layer: Layer, prefix: str, quantized: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    """The layer's nodes, which give "<prefix>y", and the constants of its input."""
    nodes, constants = layer.quantize(prefix) if quantized else ([], [])
    transposed, x = f"{prefix}wt", f"{prefix}x" if quantized else "x"
    nodes += layer.dequantize(prefix)
    nodes.append(h.make_node("Transpose", [f"{prefix}w"], [transposed], f"{prefix}transpose", perm=[1, 0]))
    nodes.append(h.make_node("MatMul", [x, transposed], [f"{prefix}y"], f"{prefix}product"))
    return nodes, constants


def _branch(layer: Layer, prefix: str, quantized: bool, own_weight: bool) -> GraphProto:
    """A branch of the `If`; names are unique in the whole file."""
    nodes, constants = _product(layer, prefix, quantized)
    if own_weight:
        names = {tensor.name: f"{prefix}{tensor.name}" for tensor in layer.weight}
        for node in nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
        for tensor in layer.weight:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = names[tensor.name]
            constants.append(copy)
    return h.make_graph(nodes, prefix, [], [_value(f"{prefix}y", layer)], constants)


def _value(name: str, layer: Layer) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, TensorProto.FLOAT16, [ROWS, layer.width])


def make_model(layer: Layer, activations: str, weight: Weight, constant_scales: bool) -> onnx.ModelProto:
    """The graph of a row."""
    inputs, constants = [_value("x", layer)], list[TensorProto]()
    if activations == "both":
        inputs.append(h.make_tensor_value_info("choose", TensorProto.BOOL, []))
        own = weight == "in each branch"
        then, otherwise = _branch(layer, "a_", True, own), _branch(layer, "b_", False, own)
        nodes = [h.make_node("If", ["choose"], ["y"], "choice", then_branch=then, else_branch=otherwise)]
    else:
        nodes, constants = _product(layer, "o_", activations == "quantized")
        nodes[-1].output[0] = "y"
    large = [tensor for tensor in layer.weight if len(tensor.dims) > 0]
    if weight == "input":
        inputs += [h.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in large]
        constants += [tensor for tensor in layer.weight if tensor not in large]
    elif weight == "outside":
        constants += layer.weight
    if constant_scales:
        constants.append(h.make_tensor(SCALE, TensorProto.FLOAT, [], [0.02]))
    elif activations != "16 bits":
        inputs.append(h.make_tensor_value_info(SCALE, TensorProto.FLOAT, []))
    graph = h.make_graph(nodes, "layer", inputs, [_value("y", layer)], constants)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 23), h.make_opsetid("trt", 1)], ir_version=11)


# ---------------------------------------------------------------------------------------------------- measuring


def compile_model(model: onnx.ModelProto, target: str) -> int | None:
    """Bytes of the plan; None where the compiler refuses the graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(model, path)
        try:
            return len(RtxBackend().build(path, TARGETS[target], BatchRange(1, ROWS, ROWS)))
        except AdatsqError as error:
            sys.stderr.write(f"{error}\n")
            return None


def measure() -> Results:
    """Compile every row."""
    narrow, wide = (make_layers(width) for width in WIDTHS)
    rows = []
    for pair in zip(narrow, wide, strict=True):
        for activations, weight, constant_scales in FORMS:
            for target in TARGET_NAMES:
                models = (make_model(layer, activations, weight, constant_scales) for layer in pair)
                sizes = [compile_model(model, target) for model in models]
                rows.append(
                    Row(
                        grid=pair[0].grid,
                        activations=activations,
                        weight=weight,
                        constant_scales=constant_scales,
                        target=target,
                        plan_bytes=None if None in sizes else (sizes[0], sizes[1]),
                    )
                )
    stored = {layer.grid: sum(len(t.raw_data) for t in layer.weight) / layer.width**2 for layer in wide}
    return Results(version=RtxBackend().version(), bytes_per_weight=stored, rows=tuple(rows))


def table_of(results: Results) -> str:
    """Markdown: bytes per weight of every plan, or what a plan without weights has."""
    lines = [
        "| weight | one copy | target | constant, 16-bit x | constant, quantized x | input, 16-bit x "
        "| input, quantized x | `If`: in each branch | the same, constant scales | `If`: outside | `If`: input |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(r.grid, r.activations, r.weight, r.constant_scales, r.target): r for r in results.rows}
    for grid, stored in results.bytes_per_weight.items():
        for target in TARGET_NAMES:
            cells = " | ".join(_cell(found[(grid, *form, target)]) for form in FORMS)
            lines.append(f"| {grid} | {stored:.2f} | {target} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.plan_bytes is None or row.bytes_per_weight is None:
        return "refused"
    return f"{row.plan_bytes[0] / 1000:.0f} kB" if row.weight == "input" else f"{row.bytes_per_weight:.2f}"


def main() -> None:
    """Compile, write weights_once.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=Path, help="file with the markers that the table goes between")
    options = parser.parse_args()
    results = measure()
    write_json_model(RESULTS, results)
    sys.stdout.write(table_of(results))
    if options.document is not None:
        replace_marked(options.document, "weights-once", table_of(results))


if __name__ == "__main__":
    main()

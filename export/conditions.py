"""What every written graph must satisfy before it gets its final name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.insert_qdq import FORMAT, SCALE_SUFFIX
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.export.weight_store import INLINE_LIMIT_BYTES
from adatsq_trt.formats import Format

_PLAIN_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def check_graph(path: Path, formats: Mapping[str, Format]) -> None:
    """Check a graph file; its weight file must lie beside it.

    Args:
        path: the ONNX file.
        formats: module path → format; empty for the reference.

    Raises:
        AdatsqError: onnx.checker refuses the file; names repeat; a layer is missing or has another format; a static
            layer has no scale input; a large tensor is inside the file; a bias is quantized.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AdatsqError(f"the exporter wrote a graph that onnx.checker refuses: {error}") from error
    graph = onnx.load(path, load_external_data=False).graph
    problems = [
        *_repeated_names(graph),
        *_wrong_formats(graph, formats),
        *_large_embedded(graph),
        *_quantized_biases(graph),
    ]
    if problems:
        raise AdatsqError(f"the exporter wrote a wrong graph, '{path.name}': {'; '.join(problems[:3])}")


def _repeated_names(graph: onnx.GraphProto) -> list[str]:
    values = Counter(
        [value.name for value in graph.input]
        + [tensor.name for tensor in graph.initializer]
        + [output for node in graph.node for output in node.output if output]
    )
    nodes = Counter(node.name for node in graph.node)
    return [f"the name '{name}' repeats" for names in (values, nodes) for name, count in names.items() if count > 1]


def _wrong_formats(graph: onnx.GraphProto, formats: Mapping[str, Format]) -> list[str]:
    """Every layer has its format, and exactly the static ones have a scale input."""
    got = {}
    for node in graph.node:
        properties = {entry.key: entry.value for entry in node.metadata_props}
        if FORMAT in properties:
            got[properties[MODULE]] = properties[FORMAT]
    wanted = {layer: fmt.name for layer, fmt in formats.items()}
    problems = [
        f"layer '{layer}' has format {got.get(layer)}, expected {wanted.get(layer)}"
        for layer in sorted(got.keys() | wanted.keys())
        if got.get(layer) != wanted.get(layer)
    ]
    scales = {value.name for value in graph.input if value.name.endswith(f".{SCALE_SUFFIX}")}
    static = {f"{layer}.{SCALE_SUFFIX}" for layer, fmt in formats.items() if fmt.static_activation}
    return problems + [f"scale input '{name}' is missing or not asked for" for name in sorted(scales ^ static)]


def _large_embedded(graph: onnx.GraphProto) -> list[str]:
    return [
        f"tensor '{tensor.name}': {len(tensor.raw_data)} bytes are inside the file, the limit is {INLINE_LIMIT_BYTES}"
        for tensor in graph.initializer
        if len(tensor.raw_data) >= INLINE_LIMIT_BYTES
    ]


def _quantized_biases(graph: onnx.GraphProto) -> list[str]:
    return [
        f"bias '{tensor.name}' has the type {onnx.TensorProto.DataType.Name(tensor.data_type)}"
        for tensor in graph.initializer
        if tensor.name.endswith(".bias") and tensor.data_type not in _PLAIN_TYPES
    ]

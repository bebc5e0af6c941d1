"""Conditions that every written graph must satisfy before it gets its final name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import onnx

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.insert_qdq import FORMAT, SCALE_SUFFIX
from adatsq_trt.export.name_nodes import MODULE
from adatsq_trt.export.weight_store import INLINE_LIMIT_BYTES
from adatsq_trt.formats import Format

_PLAIN_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def check_graph(path: Path, formats: Mapping[str, Collection[Format]]) -> None:
    """Check a graph file; its weight file must lie beside it.

    Args:
        path: the ONNX file.
        formats: module path → its formats, several where assignments are switched; empty for the reference.

    Raises:
        AdatsqError: onnx.checker refuses the file; names repeat; a layer is missing or has other formats; a static
            layer has no scale input; a large tensor is inside the file; a bias is quantized.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AdatsqError(f"the exporter wrote a graph that onnx.checker refuses: {error}") from error
    graphs = list(with_subgraphs(onnx.load(path, load_external_data=False).graph))
    problems = [
        *_repeated_names(graphs),
        *_wrong_formats(graphs, formats),
        *_large_embedded(graphs),
        *_quantized_biases(graphs),
    ]
    if problems:
        raise AdatsqError(f"the exporter wrote a wrong graph, '{path.name}': {'; '.join(problems[:3])}")


def with_subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the branches of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from with_subgraphs(attribute.g)


def _repeated_names(graphs: Collection[onnx.GraphProto]) -> list[str]:
    values = Counter(
        [value.name for graph in graphs for value in graph.input]
        + [tensor.name for graph in graphs for tensor in graph.initializer]
        + [output for graph in graphs for node in graph.node for output in node.output if output]
    )
    nodes = Counter(node.name for graph in graphs for node in graph.node)
    return [f"the name '{name}' repeats" for names in (values, nodes) for name, count in names.items() if count > 1]


def _wrong_formats(graphs: Collection[onnx.GraphProto], formats: Mapping[str, Collection[Format]]) -> list[str]:
    """Every layer has its formats, and exactly the static ones have a scale input."""
    got = defaultdict[str, list[str]](list)
    for node in (node for graph in graphs for node in graph.node):
        properties = {entry.key: entry.value for entry in node.metadata_props}
        if FORMAT in properties:
            got[properties[MODULE]] += properties[FORMAT].split(",")  # a plugin node has all of its layer's formats
    wanted = {layer: sorted(fmt.name for fmt in several) for layer, several in formats.items()}
    problems = [
        f"layer '{layer}' has format {_listed(got.get(layer))}, expected {_listed(wanted.get(layer))}"
        for layer in sorted(got.keys() | wanted.keys())
        if sorted(got.get(layer, ())) != wanted.get(layer)
    ]
    scales = {v.name for graph in graphs for v in graph.input if v.name.endswith(f".{SCALE_SUFFIX}")}
    static = {f"{layer}.{SCALE_SUFFIX}" for layer, fmts in formats.items() if any(f.scaled_activation for f in fmts)}
    return problems + [f"scale input '{name}' is missing or not asked for" for name in sorted(scales ^ static)]


def _listed(names: Collection[str] | None) -> str:
    return ", ".join(names) if names else "none"


def _large_embedded(graphs: Collection[onnx.GraphProto]) -> list[str]:
    return [
        f"tensor '{tensor.name}': {len(tensor.raw_data)} bytes are inside the file, the limit is {INLINE_LIMIT_BYTES}"
        for graph in graphs
        for tensor in graph.initializer
        if len(tensor.raw_data) >= INLINE_LIMIT_BYTES
    ]


def _quantized_biases(graphs: Collection[onnx.GraphProto]) -> list[str]:
    return [
        f"bias '{tensor.name}' has the type {onnx.TensorProto.DataType.Name(tensor.data_type)}"
        for graph in graphs
        for tensor in graph.initializer
        if tensor.name.partition("@")[0].endswith(".bias") and tensor.data_type not in _PLAIN_TYPES
    ]

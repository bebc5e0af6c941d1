"""Compute a graph's constants before ONNX Runtime sees them, one after another.

ONNX Runtime computes them itself, but keeps every intermediate result of every weight until all are done, which is
several times what stays. Here the result for one weight at a time goes into a file. ONNX Runtime maps that file, so a
weight is in memory only while it is packed for the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, set_external_data, uses_external_data

from adatsq_trt.engines.plan_weights import initializers, self_contained

MODEL_NAME, DATA_NAME = "folded.onnx", "folded.data"
_ALIGNMENT_BYTES, _INLINE_BYTES = 4096, 1024
# They stay with their product, to be fused with it.
_KEPT = ("DequantizeLinear", "QuantizeLinear")


def weight_file_bytes(path: Path) -> int:
    """Size of the largest file that a graph's constants lie in; 0 where all are inside."""
    graph = onnx.load(path, load_external_data=False).graph
    places = {ExternalDataInfo(tensor).location for tensor in initializers(graph) if uses_external_data(tensor)}
    return max((_size(path.parent / place) for place in places), default=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def fold(path: Path, folder: Path) -> Path:
    """Write a graph whose constants are computed; it gives bit for bit the same.

    Args:
        path: the graph, with its external data beside it.
        folder: receives the new graph and its data, which depend on nothing else.

    Returns:
        Path of the new graph.

    Raises:
        OSError: the folder cannot hold them.
    """
    model = onnx.load(path, load_external_data=False)
    with (folder / DATA_NAME).open("wb") as data:
        _fold(model.graph, model, path.parent, data)
    result = folder / MODEL_NAME
    result.write_bytes(model.SerializeToString())
    return result


def _fold(graph: GraphProto, model: ModelProto, folder: Path, data: BinaryIO) -> None:
    """Fold a graph in place, and its subgraphs, which have constants of their own."""
    steps = _constant_nodes(graph)
    made = {name for node in steps for name in node.output}
    kept = [node for node in graph.node if node.output[0] not in made]
    for inner in (a.g for node in kept for a in node.attribute if a.type == AttributeProto.GRAPH):
        _fold(inner, model, folder, data)
    read = {output.name for output in graph.output}.union(*(_reads(node) for node in kept))
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    sources = {node.output[0]: node for node in steps}
    wanted = sorted(made & read)
    folded = [_stored(_computed(name, sources, tensors, folder, model), name, data) for name in wanted]
    held = [_moved(tensor, folder, data) for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend([*held, *folded])


def _constant_nodes(graph: GraphProto) -> list[NodeProto]:
    """Nodes of a graph that read its constants and each other only, in order."""
    known, found = {tensor.name for tensor in graph.initializer}, []
    for node in graph.node:
        if node.op_type not in _KEPT and node.input and len(node.output) == 1 and _reads(node) <= known:
            known.update(node.output)
            found.append(node)
    return found


def _reads(node: NodeProto) -> set[str]:
    """Names that a node and its subgraphs read; those that a subgraph makes itself do no harm here."""
    inside = (inner for a in node.attribute if a.type == AttributeProto.GRAPH for inner in a.g.node)
    passed = {o.name for a in node.attribute if a.type == AttributeProto.GRAPH for o in a.g.output}
    return {name for name in node.input if name}.union(passed, *(_reads(inner) for inner in inside))


def _computed(
    name: str, sources: dict[str, NodeProto], tensors: dict[str, TensorProto], folder: Path, model: ModelProto
) -> np.ndarray:
    """One constant, computed by ONNX Runtime as it would compute it at loading."""
    import onnxruntime

    nodes = list(_needed(name, sources))
    inputs = {read for node in nodes for read in node.input if read in tensors}
    loaded = [self_contained(tensors[read], folder) for read in sorted(inputs)]
    graph = onnx.helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=name)], loaded)
    small = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(small.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value: np.ndarray = session.run([name], {})[0]
    return value


def _needed(name: str, sources: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """The nodes that a constant comes from, in order; each once, since a chain does not fork."""
    node = sources[name]
    for read in dict.fromkeys(node.input):
        if read in sources:
            yield from _needed(read, sources)
    yield node


def _moved(tensor: TensorProto, folder: Path, data: BinaryIO) -> TensorProto:
    """A constant that is used as it is."""
    if not uses_external_data(tensor):
        return tensor
    loaded = self_contained(tensor, folder)
    return _placed(loaded, loaded.raw_data, data)


def _stored(value: np.ndarray, name: str, data: BinaryIO) -> TensorProto:
    """A computed constant; small ones stay in the graph."""
    tensor = onnx.numpy_helper.from_array(value, name)
    return tensor if value.nbytes < _INLINE_BYTES else _placed(tensor, tensor.raw_data, data)


def _placed(tensor: TensorProto, content: bytes, data: BinaryIO) -> TensorProto:
    """Append the content to the data file; at a page's beginning, so that it can be mapped."""
    data.write(bytes(-data.tell() % _ALIGNMENT_BYTES))
    offset = data.tell()
    data.write(content)
    set_external_data(tensor, DATA_NAME, offset, len(content))
    tensor.ClearField("raw_data")
    return tensor

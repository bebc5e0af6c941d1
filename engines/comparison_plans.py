"""Plans of a bundle's model without formats, to compare its own plans with: in full precision, and in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.formats import TARGETS

FULL_PRECISION, SIXTEEN_BITS = "full precision", "16 bits"
_TYPES = {
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (TensorProto.FLOAT16, np.float16),
}
_WEIGHTS = "weights.data"
_ALIGNMENT = 4096
_INLINE_BYTES = 1024


def build_comparison_plans(files: BundleFiles, target: str, rows: int) -> dict[str, bytes]:
    """Compile the full-precision graph as it is, and in the type that the target graphs have besides their formats.

    Args:
        files: a bundle of one size.
        target: name of the GPU target.
        rows: number of rows that the plans are tuned for, and the most that they take.

    Returns:
        Name of the case → plan; the second is missing where the base type is float32.

    Raises:
        AdatsqError: the compiler refuses a graph.
    """
    graph = files.graph_path(files.graph("reference", None))
    compiler, batch = RtxBackend(), BatchRange(1, rows, rows)
    plans = {FULL_PRECISION: compiler.build(graph, TARGETS[target], batch)}
    if files.index.base_type in _TYPES:
        with TemporaryDirectory(prefix="adatsq-16-bits-") as scratch:
            narrow = in_16_bits(graph, Path(scratch), files.index.base_type)
            plans[SIXTEEN_BITS] = compiler.build(narrow, TARGETS[target], batch)
    return plans


def in_16_bits(path: Path, folder: Path, base_type: str) -> Path:
    """A graph with every float32 in another type: weights, inputs, casts and what is computed.

    Args:
        path: of the graph; external data is found beside it.
        folder: receives the graph and its weights.
        base_type: "bfloat16" or "float16".

    Returns:
        The graph's file.
    """
    model = onnx.load(path, load_external_data=False)
    element, dtype = _TYPES[base_type]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = element
    with (folder / _WEIGHTS).open("wb") as store:
        for graph in _graphs(model.graph):
            del graph.value_info[:]
            for tensor in graph.initializer:
                _narrow(tensor, path.parent, dtype, store)
            for node in graph.node:
                _narrow_node(node, path.parent, element, dtype, store)
    target = folder / path.name
    onnx.save(model, target)
    return target


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _narrow_node(node: NodeProto, folder: Path, element: int, dtype: Any, store: BinaryIO) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _narrow(attribute.t, folder, dtype, store)
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = element
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(np.asarray(values, dtype))))


def _narrow(tensor: TensorProto, folder: Path, dtype: Any, store: BinaryIO) -> None:
    """Float32 to another type; what lies in the weight file goes to the new one."""
    external = uses_external_data(tensor)
    if tensor.data_type != TensorProto.FLOAT and not external:
        return
    array = numpy_helper.to_array(tensor, str(folder))
    if tensor.data_type == TensorProto.FLOAT:
        array = array.astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    if len(tensor.raw_data) > _INLINE_BYTES:
        _put_outside(tensor, store)


def _put_outside(tensor: TensorProto, store: BinaryIO) -> None:
    store.write(b"\0" * (-store.tell() % _ALIGNMENT))
    places = {"location": _WEIGHTS, "offset": store.tell(), "length": len(tensor.raw_data)}
    store.write(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))

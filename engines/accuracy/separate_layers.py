"""A cpu graph cut behind every layer, so that each layer is given what PyTorch computed before it.

In a whole graph a value near a tie that rounds to the other neighbour changes everything behind it: attention hands it
on to every token, where more values cross their ties. Here what reads a layer's output reads an input of the graph
instead. All between two layers, such as norms, gates and attention, belongs to the layer behind it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.helper import make_tensor_value_info

from adatsq_trt.engines.accuracy.block_cut import GraphView
from adatsq_trt.engines.accuracy.comparison import Arrays
from adatsq_trt.engines.accuracy.references import OUTPUT_SUFFIX
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import write_bytes

GIVEN_SUFFIX = ".given"


def write_separated(graph: Path, layers: Arrays, output: str, path: Path) -> None:
    """Write a cpu graph whose layers do not see each other, weights inside.

    Args:
        graph: cpu graph of an assignment; its weights lie beside it.
        layers: module path → PyTorch's output.
        output: name of the graph's output, which is computed from the given outputs too.
        path: file to write.

    Raises:
        AdatsqError: the file is not an ONNX graph, or its weights are not where it says.
        OutputError: the file cannot be written.
    """
    view = GraphView(graph)
    given = {f"{layer}{OUTPUT_SUFFIX}": f"{layer}{GIVEN_SUFFIX}" for layer in layers}
    for node in view.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = given.get(name, name)
    inputs = [
        make_tensor_value_info(f"{layer}{GIVEN_SUFFIX}", TensorProto.FLOAT, [None] * value.ndim)
        for layer, value in layers.items()
    ]
    try:
        model = view.extract(inputs, [*given, output])
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise AdatsqError(
            f"'{graph}': its weights cannot be read: {error}; run 'adatsq-trt build engine' again"
        ) from error
    write_bytes(path, model.SerializeToString())


def given_inputs(layers: Arrays) -> Arrays:
    """PyTorch's outputs of the layers, as inputs of the separated graph."""
    return {f"{layer}{GIVEN_SUFFIX}": value for layer, value in layers.items()}

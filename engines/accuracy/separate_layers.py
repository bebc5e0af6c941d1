"""A cpu graph cut behind every layer, so that each layer is given what PyTorch computed before it.

In a whole graph a value near a tie that rounds to the other neighbour changes everything behind it: attention hands it
on to every token, where more values cross their ties. Here what reads a layer's output reads an input of the graph
instead. All between two layers, such as norms, gates and attention, belongs to the layer behind it.

Tokens that are equal, such as those that fill up a prompt or an image, round alike: one flip is in all of them, and
where they are most of a layer's rows it moves the median. So a layer gives the first and the last of equal rows only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info

from adatsq_trt.engines.accuracy.block_cut import GraphView
from adatsq_trt.engines.accuracy.comparison import Arrays
from adatsq_trt.engines.accuracy.references import OUTPUT_SUFFIX
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import write_bytes

GIVEN_SUFFIX, ROWS_SUFFIX = ".given", ".rows"
_EQUAL = 1e-5  # relative difference of rows that are one token's


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
    for layer, value in layers.items():
        _choose_rows(model, layer, value.shape[-1])
    write_bytes(path, model.SerializeToString())


def _choose_rows(model: ModelProto, layer: str, width: int) -> None:
    """Have the graph give only the rows [rows, N] of a layer's output [..., N] that an input names."""
    output, rows = f"{layer}{OUTPUT_SUFFIX}", f"{layer}{ROWS_SUFFIX}"
    every, flat = f"{output}/every", f"{output}/flat"
    for node in model.graph.node:
        node.output[:] = [every if name == output else name for name in node.output]
    model.graph.node.extend(
        [
            make_node("Flatten", [every], [flat], f"{layer}/FlattenRows", axis=-1),
            make_node("Gather", [flat, rows], [output], f"{layer}/ChooseRows", axis=0),
        ]
    )
    model.graph.input.append(make_tensor_value_info(rows, TensorProto.INT64, [None]))
    (declared,) = (value for value in model.graph.output if value.name == output)
    declared.CopyFrom(make_tensor_value_info(output, TensorProto.FLOAT, [None, width]))


def given_inputs(layers: Arrays) -> dict[str, np.ndarray]:
    """PyTorch's outputs of the layers, and the rows to choose of each, as inputs of the separated graph."""
    given = {f"{layer}{GIVEN_SUFFIX}": value for layer, value in layers.items()}
    return given | {f"{layer}{ROWS_SUFFIX}": chosen_rows(value) for layer, value in layers.items()}


def chosen_outputs(layers: Arrays) -> dict[str, np.ndarray]:
    """Select the expected outputs of the separated graph: their names → rows [rows, N] of PyTorch's."""
    return {
        f"{layer}{OUTPUT_SUFFIX}": value.reshape(-1, value.shape[-1])[chosen_rows(value)]
        for layer, value in layers.items()
    }


def chosen_rows(output: np.ndarray) -> np.ndarray:
    """The first and the last of equal rows, of all leading axes together: int64 [rows], ascending.

    Args:
        output: [..., N].
    """
    rows = output.reshape(-1, output.shape[-1])
    direction = np.random.default_rng(0).standard_normal(rows.shape[1], dtype=np.float32)
    order = np.argsort(rows @ direction)  # equal rows become neighbours
    following = rows[order[1:]]
    equal = np.linalg.norm(following - rows[order[:-1]], axis=1) <= _EQUAL * np.linalg.norm(following, axis=1)
    groups = np.split(order, 1 + np.flatnonzero(~equal))
    return np.unique([place for group in groups for place in (group.min(), group.max())]).astype(np.int64)

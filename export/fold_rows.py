"""Where a factor for every channel of a value can go instead: rows that the value is a product or a sum of."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir import DataType

Place = tuple[ir.Node, int]  # a node and the index of one of its inputs
_FLOATS = (DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16)


def rows_before(value: ir.Value, readers: Collection[ir.Node]) -> list[Place] | None:
    """The rows to multiply by a factor for each channel, so that a value is multiplied by it.

    A row has one number for each channel: a constant [K], or [..., 1, K] of each sample. Factors are powers of two, so
    that casts on the way may stay.

    Args:
        value: [..., K].
        readers: nodes that may get it multiplied.

    Returns:
        None where something else reads the value, or it does not come from rows.
    """
    node = value.producer()
    if node is None or value.is_graph_output() or any(user not in readers for user, _ in value.uses()):
        return None
    width = None if value.shape is None else value.shape[-1]
    if not isinstance(width, int):
        return None
    if node.op_type == "Add":
        found = [_rows_of(node, index, width) for index in (0, 1)]
        return None if None in found else [place for places in found for place in places or ()]
    if node.op_type == "Mul":
        found = sorted((_rows_of(node, index, width) for index in (0, 1)), key=lambda places: len(places or "none"))
        return next((places for places in found if places is not None), None)
    if node.op_type == "LayerNormalization":
        found = [_rows_of(node, index, width) for index in range(1, len(node.inputs))]
        return None if None in found else [place for places in found for place in places or ()]
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype in _FLOATS:
        return rows_before(node.inputs[0], [node])
    return None


def _rows_of(node: ir.Node, index: int, width: int) -> list[Place] | None:
    """The input itself where it is a row, else the rows that it comes from."""
    value = node.inputs[index]
    if value is None:
        return []
    if is_row(value, width):
        return [(node, index)]
    return rows_before(value, [node])


def is_row(value: ir.Value, width: int) -> bool:
    """Whether a value has one number for each channel, for each sample or for all."""
    shape = value.shape
    if shape is None or shape.rank() == 0 or shape[-1] != width:
        return False
    return shape.rank() == 1 or shape[-2] == 1

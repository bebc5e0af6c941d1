"""Whether two graphs compute the same, operator by operator.

Every value gets a hash of what makes it: an operator, its attributes and the hashes of what it reads, down to graph
inputs and constants. So names, the order of nodes and Identity nodes do not count. Of a choice (`If`) the branch counts
that an assignment takes. Constants in the weight file are known by their place there, so both graphs must share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import uses_external_data
from onnx.helper import get_attribute_value
from onnx.numpy_helper import to_array

from adatsq_trt.engines.accuracy.block_cut import module_of
from adatsq_trt.errors import AdatsqError
from adatsq_trt.graph_index import ASSIGNMENT_INPUT


def first_difference(together: ModelProto, alone: ModelProto, assignment: int) -> str | None:
    """Where a graph of all assignments leaves the graph of one.

    Args:
        together: takes the assignment's index as its input `bucket`, where assignments differ.
        alone: the assignment's own graph, or another with the same names.
        assignment: index into the policy's assignments.

    Returns:
        The module of the first value, in the order of execution, that both graphs name and make differently; None
        where they compute the same.

    Raises:
        AdatsqError: a choice does not depend on the assignment alone.
    """
    got, expected = _Values(together, assignment).hashes, _Values(alone, assignment).hashes
    if all(got.get(value.name) == expected[value.name] for value in alone.graph.output):
        return None
    for node in alone.graph.node:
        if any(name in got and got[name] != expected[name] for name in node.output):
            return module_of(node) or node.name
    return ", ".join(value.name for value in alone.graph.output)


class _Values:
    """Hashes of a graph's values, by name."""

    def __init__(self, model: ModelProto, assignment: int) -> None:
        self._assignment = assignment
        self._tables: dict[str, TensorProto] = {}
        self._choices: dict[str, bool] = {}  # condition → its value
        self.hashes: dict[str, bytes] = {
            value.name: _hash("input", value.name, value.type.tensor_type.elem_type) for value in model.graph.input
        }
        self._add(model.graph)

    def _add(self, graph: GraphProto) -> None:
        """A graph or a branch; names are unique in the whole file."""
        for tensor in graph.initializer:
            self._tables[tensor.name] = tensor
            self.hashes[tensor.name] = _constant(tensor)
        for node in graph.node:
            if node.op_type == "If":
                self._choose(node)
            elif node.op_type == "Identity":
                self.hashes[node.output[0]] = self._of(node.input[0])
            else:
                self._compute(node)

    def _of(self, name: str) -> bytes:
        return self.hashes.get(name, b"nothing") if name else b""

    def _compute(self, node: NodeProto) -> None:
        if node.op_type == "Gather" and node.input[1] == ASSIGNMENT_INPUT:
            self._choices[node.output[0]] = bool(to_array(self._tables[node.input[0]])[self._assignment])
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        own = _hash(node.domain, node.op_type, *attributes, *map(self._of, node.input))
        self.hashes |= {name: _hash(own, place) for place, name in enumerate(node.output)}

    def _choose(self, node: NodeProto) -> None:
        if node.input[0] not in self._choices:
            raise AdatsqError(f"'{node.name}' does not choose by the assignment; run 'adatsq-trt build engine' again")
        branches: Mapping[str, GraphProto] = {a.name: get_attribute_value(a) for a in node.attribute}
        branch = branches["then_branch" if self._choices[node.input[0]] else "else_branch"]
        self._add(branch)
        self.hashes |= {name: self._of(value.name) for name, value in zip(node.output, branch.output, strict=True)}


def _constant(tensor: TensorProto) -> bytes:
    if uses_external_data(tensor):
        content = "".join(sorted(f"{entry.key}={entry.value} " for entry in tensor.external_data))
        return _hash("stored", tensor.data_type, list(tensor.dims), content)
    return _hash("constant", tensor.data_type, list(tensor.dims), tensor.raw_data or to_array(tensor).tobytes())


def _hash(*parts: object) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()

"""Cut a `target` graph into pieces, and a piece out of it and out of its `cpu` twin.

The pieces are the transformer's blocks and, outside of them, one for each module: embedders, the final norm and
projection. Together they cover the graph. Nodes carry the path of their module as metadata, and values keep their
names from one variant to the other, except for those that lowering adds. So a cut is a set of boundary values that both
graphs have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, ValueInfoProto
from onnx.helper import make_empty_tensor_value_info, make_graph, make_model

from adatsq_trt.engines.plan_weights import self_contained
from adatsq_trt.errors import AdatsqError

MODULE_KEY = "adatsq.module"
MODEL_PIECE = "model"  # nodes of the model itself, outside of all its modules


@dataclass(frozen=True)
class Piece:
    """Nodes of a target graph that are compared together.

    Attributes:
        name: module path of a block, or of a module outside of the blocks; MODEL_PIECE for nodes of no module.
        nodes: first outputs of its nodes.
    """

    name: str
    nodes: frozenset[str]


@dataclass(frozen=True)
class Cut:
    """The border of a piece.

    Attributes:
        inputs: names of the values that enter it, graph inputs among them.
        outputs: names of the values that leave it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class GraphView:
    """An ONNX file without its weights, with look-ups by name."""

    def __init__(self, path: Path) -> None:
        """Read a graph.

        Args:
            path: its external data stays on disk until a part is extracted.
        """
        self.path = path
        self.model = load_graph(path)
        self.graph = self.model.graph
        self.inputs = {value.name for value in self.graph.input}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}

    @cached_property
    def varying(self) -> frozenset[str]:
        """Values that depend on a graph input; everything else is a constant."""
        varying = set(self.inputs)
        for node in self.graph.node:
            if varying.intersection(node.input):
                varying.update(node.output)
        return frozenset(varying)

    @cached_property
    def types(self) -> dict[str, ValueInfoProto]:
        """Types of the graph's values, as the file declares them."""
        return {v.name: v for v in (*self.graph.input, *self.graph.value_info, *self.graph.output)}

    def extract(self, inputs: Iterable[ValueInfoProto], outputs: Collection[str]) -> ModelProto:
        """The nodes between inputs and outputs as a model of its own, weights inside.

        Args:
            inputs: with element types; graph inputs that the nodes read besides are added.
            outputs: names of values.
        """
        inputs = list(inputs)
        given = {value.name for value in inputs}
        needed = self.needed_nodes(given, outputs)
        used = {name for node in needed for name in node.input}
        inputs += [value for value in self.graph.input if value.name in used - given]
        constants = [tensor for name, tensor in self.initializers.items() if name in used]
        weights = [self_contained(tensor, self.path.parent) for tensor in constants]
        results = [self.types.get(name) or make_empty_tensor_value_info(name) for name in outputs]
        graph = make_graph(needed, "block", inputs, results, weights)
        return make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )

    def needed_nodes(self, given: Collection[str], outputs: Iterable[str]) -> list[NodeProto]:
        """Nodes that the outputs need, in the graph's order; the walk upwards ends at given values."""
        pending, needed = list(outputs), set[str]()
        while pending:
            name = pending.pop()
            node = self.producers.get(name)
            if node is None or name in given or node.output[0] in needed:
                continue
            needed.add(node.output[0])
            pending.extend(node.input)
        return [node for node in self.graph.node if node.output[0] in needed]


def find_pieces(target: GraphView, cpu: GraphView, blocks: Sequence[str]) -> list[Piece]:
    """Find the pieces that a target graph is compared in: modules outside of the blocks, as they run, then the blocks.

    Outside of the blocks, what nodes compute from constants alone, and Casts that lowering leaves out, belong to all
    pieces that read them.

    Args:
        target: graph whose nodes carry module paths.
        cpu: the graph that it was lowered to.
        blocks: module paths.
    """
    nodes: dict[str, set[str]] = {}
    inside: dict[str, set[str]] = {block: set() for block in blocks}
    for node in target.graph.node:
        path = module_of(node)
        block = next((block for block in blocks if path == block or path.startswith(f"{block}.")), None)
        if block is not None:
            inside[block].add(node.output[0])
        elif node.output[0] in target.varying and (node.op_type != "Cast" or node.output[0] in cpu.producers):
            nodes.setdefault(path or MODEL_PIECE, set()).add(node.output[0])
    return [Piece(name, frozenset(members)) for name, members in (*nodes.items(), *inside.items())]


def find_cut(target: GraphView, cpu: GraphView, piece: Piece) -> Cut:
    """The border of a piece: what enters and leaves it in the target graph and has a name in the cpu graph too.

    Lowering leaves out Casts between types that become one. Where it so renamed a value, the cut moves up to the next
    value that both graphs have: beyond the piece for what enters, up to the Cast's source for what leaves.

    Raises:
        AdatsqError: no node belongs to the piece, or no value that leaves it is in the cpu graph.
    """
    members = piece.nodes
    outside = [node for node in target.graph.node if node.output[0] not in members]
    wanted = {name for node in outside for name in node.input} | {value.name for value in target.graph.output}
    sources = [
        _cast_source(target, cpu, members, name)
        for node in target.graph.node
        if node.output[0] in members
        for name in node.output
        if name in wanted and name in target.varying
    ]
    leaving = dict.fromkeys(name for name in sources if name in cpu.producers)
    if not leaving:
        raise AdatsqError(
            f"'{target.path}': no value leaves '{piece.name}' under a name that '{cpu.path.name}' has too "
            f"({len(members)} nodes belong to it); run 'adatsq-trt export' again"
        )
    return Cut(tuple(_entering(target, cpu, members, leaving)), tuple(leaving))


def load_graph(path: Path) -> ModelProto:
    """Read a graph without its weights.

    Raises:
        AdatsqError: the file is not an ONNX graph.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise AdatsqError(f"'{path}' is not an ONNX graph: {error}; run 'adatsq-trt build engine' again") from error


def module_of(node: NodeProto) -> str:
    """Path of the module that a node comes from."""
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE_KEY), "")


def _cast_source(target: GraphView, cpu: GraphView, members: Collection[str], name: str) -> str:
    """The value itself, or what the piece's Casts made it of where the cpu graph has no such Cast."""
    while name not in cpu.producers:
        node = target.producers[name]
        if node.op_type != "Cast" or node.input[0] not in members:
            break
        name = node.input[0]
    return name


def _entering(target: GraphView, cpu: GraphView, members: Collection[str], leaving: Iterable[str]) -> list[str]:
    """Walk upwards from the outputs; stop at graph inputs and at values from outside that both graphs have."""
    pending, seen, entering = list(leaving), set[str](), []
    while pending:
        name = pending.pop()
        if not name or name in seen or name in target.initializers:
            continue
        seen.add(name)
        node = target.producers.get(name)
        shared = name in target.varying and name in cpu.producers
        if node is None or (shared and node.output[0] not in members):
            entering.append(name)
        else:
            pending.extend(node.input)
    return sorted(entering)

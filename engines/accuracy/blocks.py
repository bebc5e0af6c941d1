"""One piece of a `target` graph, in onnx's reference evaluator, against the same piece of its `cpu` twin.

Both get the same values at the piece's border, rounded to the target graph's types, so that only the piece itself can
make a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype
from polygraphy.comparator import Comparator

from adatsq_trt.engines.accuracy.block_cut import Cut, GraphView, Piece, find_cut, find_pieces
from adatsq_trt.engines.accuracy.comparison import Arrays, quiet_polygraphy, run_in_onnxruntime
from adatsq_trt.engines.accuracy.reference_ops import ReferenceRunner
from adatsq_trt.engines.accuracy.references import BRANCH_SUFFIX, OUTPUT_SUFFIX
from adatsq_trt.engines.accuracy.rounded_layers import count_rounded_layers
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import write_bytes

REFERENCE_NAME = "onnx ReferenceEvaluator"
_FLOATS = (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16)


@dataclass(frozen=True)
class BlockRun:
    """A piece's outputs, computed twice.

    Attributes:
        inputs: of the cpu piece.
        expected: outputs of the target piece in onnx's evaluator, those of its layers among them.
        got: the same of the cpu piece in ONNX Runtime.
        graph: the cpu piece as an ONNX file.
        layers: output → how often a quantized layer's error counts in it.
    """

    inputs: Arrays
    expected: Arrays
    got: Arrays
    graph: Path
    layers: Mapping[str, int]


@dataclass(frozen=True)
class BlockPair:
    """The graphs of one assignment in both variants, of which pieces are run.

    Attributes:
        bundle: with a target and a cpu graph for the assignment.
        assignment: index into the policy's assignments.
        feed: inputs of the cpu graph, scales among them, for a few rows.
    """

    bundle: BundleFiles
    assignment: int
    feed: Arrays

    @cached_property
    def _graphs(self) -> tuple[GraphView, GraphView]:
        target, cpu = (self.bundle.assignment_graph(variant, self.assignment) for variant in ("target", "cpu"))
        return GraphView(self.bundle.graph_path(target)), GraphView(self.bundle.graph_path(cpu))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The transformer's blocks, in order."""
        return self.bundle.index.blocks_of(self.bundle.assignment_graph("target", self.assignment).expert)

    @cached_property
    def _pieces(self) -> dict[str, Piece]:
        return {piece.name: piece for piece in find_pieces(*self._graphs, self.blocks)}

    @property
    def outside(self) -> list[str]:
        """Names of the pieces outside of the blocks.

        Raises:
            AdatsqError: a file is not an ONNX graph.
        """
        return [name for name in self._pieces if name not in self.bundle.index.blocks]

    @cached_property
    def _cuts(self) -> dict[str, Cut]:
        """Piece → its border, with the outputs of its layers, and of their 16-bit branches, among the outputs."""
        target, cpu = self._graphs
        cuts = {}
        for name, piece in self._pieces.items():
            suffixes = (BRANCH_SUFFIX, OUTPUT_SUFFIX)
            layers = [f"{layer}{suffix}" for layer in self._layers(name) for suffix in suffixes]
            inside = [value for value in layers if value in cpu.producers]
            border = find_cut(target, cpu, piece)
            cuts[name] = Cut(border.inputs, tuple(dict.fromkeys((*inside, *border.outputs))))
        return cuts

    def _layers(self, piece: str) -> list[str]:
        """Module paths of a piece's quantized layers."""
        nodes = self._pieces[piece].nodes
        target, _ = self._graphs
        outputs = {layer: target.producers.get(f"{layer}{OUTPUT_SUFFIX}") for layer in self.bundle.policy.layers}
        return [layer for layer, node in outputs.items() if node is not None and node.output[0] in nodes]

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """Inputs of the pieces, computed by the cpu graph."""
        _, cpu = self._graphs
        entering = sorted({name for cut in self._cuts.values() for name in cut.inputs if name in cpu.producers})
        inside = run_in_onnxruntime(cpu.path, [self.feed], entering)[0] if entering else {}
        return {**self.feed, **inside}

    def border(self, piece: str) -> Cut:
        """Find what enters and leaves a piece.

        Raises:
            AdatsqError: the variants do not share its border.
        """
        return find_cut(*self._graphs, self._pieces[piece])

    def declared(self, names: Iterable[str]) -> list[ValueInfoProto]:
        """Values of the target graph with the types that they have there."""
        target, _ = self._graphs
        kinds = {name: _kind(target, name, np.dtype(np.float32), self.bundle.index.base_type) for name in names}
        return [make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]

    def continue_from(self, piece: str, graph: Path, values: Arrays) -> BlockRun:
        """Run the cpu piece on what another computation of the target graph has at its border.

        Args:
            piece: its name.
            graph: path of the ONNX file that the cpu piece is written to.
            values: of the whole border, float32.

        Returns:
            `expected` are the cpu piece's outputs, and `got` those of the other computation.

        Raises:
            AdatsqError: the variants do not share the piece's border, or the piece cannot be run.
        """
        (target, cpu), cut, known = self._graphs, self.border(piece), {**self.feed, **values}
        _require(known, (*cut.inputs, *cut.outputs), target.path)
        inputs = _write_cpu_block(cpu, cut, known, graph)
        expected = run_in_onnxruntime(graph, [inputs])[0]
        counts = count_rounded_layers(target, self._layers(piece))
        layers = {name: counts.get(name, 0) for name in cut.outputs}
        got = {name: np.asarray(known[name]) for name in cut.outputs}
        return BlockRun(inputs, {n: v.astype(np.float32) for n, v in expected.items()}, got, graph, layers)

    def run(self, piece: str, graph: Path) -> BlockRun:
        """Cut a piece out of both variants and run each.

        Args:
            piece: its name.
            graph: path of the ONNX file that the cpu piece is written to.

        Raises:
            AdatsqError: the variants do not share the piece's border, or a graph cannot be run.
        """
        (target, cpu), cut, values = self._graphs, self._cuts[piece], self._values
        _require(values, cut.inputs, target.path)
        inputs = [_input(target, name, values[name], self.bundle.index.base_type) for name in cut.inputs]
        rounded = {**values, **{value.name: _rounded(values[value.name], value) for value in inputs}}
        cpu_inputs = _write_cpu_block(cpu, cut, rounded, graph)
        expected = _evaluate(target.extract(inputs, cut.outputs), {v.name: rounded[v.name] for v in inputs})
        got = run_in_onnxruntime(graph, [cpu_inputs])[0]
        counts = count_rounded_layers(target, self._layers(piece))
        layers = {name: counts.get(name, 0) for name in cut.outputs}
        return BlockRun(cpu_inputs, expected, {n: v.astype(np.float32) for n, v in got.items()}, graph, layers)


def _require(values: Arrays, names: Iterable[str], graph: Path) -> None:
    """Refuse a graph that asks for more than its index says."""
    unknown = [name for name in names if name not in values]
    if unknown:
        raise AdatsqError(
            f"'{graph}' takes '{unknown[0]}', which the index does not list; run 'adatsq-trt export' again"
        )


def _evaluate(block: ModelProto, feed: Arrays) -> dict[str, np.ndarray]:
    """Outputs of a target piece in onnx's evaluator."""
    # The evaluator documents no common base for what it does not like about a graph.
    try:
        with quiet_polygraphy():
            results = Comparator.run([ReferenceRunner(block, REFERENCE_NAME)], data_loader=[feed])
    except Exception as error:
        raise AdatsqError(
            f"onnx's reference evaluator cannot run the target piece: {error}; run 'adatsq-trt export' again"
        ) from error
    return dict(results[0][1][0])


def _input(target: GraphView, name: str, value: np.ndarray, base_type: str) -> ValueInfoProto:
    """The declaration of a value that enters the target piece, in the type that it has there."""
    return make_tensor_value_info(name, _kind(target, name, value.dtype, base_type), [None] * value.ndim)


def _kind(target: GraphView, name: str, dtype: np.dtype, base_type: str) -> int:
    """ONNX type of a value of the target graph, which is of this type in the cpu graph."""
    known = target.types.get(name)
    kind = known.type.tensor_type.elem_type if known is not None else TensorProto.UNDEFINED
    if kind != TensorProto.UNDEFINED:
        return int(kind)
    floating = np.issubdtype(dtype, np.floating)
    return int(TensorProto.DataType.Value(_ONNX_NAMES[base_type]) if floating else np_dtype_to_tensor_dtype(dtype))


_ONNX_NAMES = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT"}


def _rounded(value: np.ndarray, declared: ValueInfoProto) -> np.ndarray:
    """A value as the target graph's type holds it, in the type that the cpu graph has."""
    kind = declared.type.tensor_type.elem_type
    return value.astype(tensor_dtype_to_np_dtype(kind)).astype(value.dtype) if kind in _FLOATS else value


def _write_cpu_block(cpu: GraphView, cut: Cut, values: Arrays, graph: Path) -> dict[str, np.ndarray]:
    """Write a piece of the cpu graph; its inputs."""
    block = _cpu_block(cpu, cut, values)
    _require(values, [value.name for value in block.graph.input], cpu.path)
    write_bytes(graph, block.SerializeToString())
    return {value.name: values[value.name] for value in block.graph.input}


def _cpu_block(cpu: GraphView, cut: Cut, values: Arrays) -> ModelProto:
    """The same piece of the cpu graph."""
    inputs = [
        make_tensor_value_info(name, np_dtype_to_tensor_dtype(values[name].dtype), [None] * values[name].ndim)
        for name in cut.inputs
        if name in cpu.producers or name in cpu.inputs
    ]
    model = cpu.extract(inputs, cut.outputs)
    used = {name for node in model.graph.node for name in node.input}
    for value in list(model.graph.input):
        if value.name not in used:
            model.graph.input.remove(value)
    return model

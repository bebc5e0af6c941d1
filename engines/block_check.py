"""One block of a `target` graph, in onnx's reference evaluator, against the same block of its `cpu` twin.

Both get the same values at the block's border, rounded to the target graph's types, so that only the block itself can
make a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype
from polygraphy.comparator import Comparator, RunResults

from adatsq_trt.engines.block_cut import Cut, GraphView, find_cut
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.comparison import Arrays, quiet_polygraphy, run_in_onnxruntime
from adatsq_trt.engines.reference_ops import ReferenceRunner
from adatsq_trt.files import write_bytes
from adatsq_trt.formats import FORMATS

REFERENCE_NAME = "onnx ReferenceEvaluator"
_FLOATS = (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16)


@dataclass(frozen=True)
class BlockRun:
    """A block's outputs, computed twice.

    Attributes:
        block: its module path.
        inputs: of the cpu block.
        expected: polygraphy's results of the target block in onnx's evaluator.
        got: polygraphy's results of the cpu block in ONNX Runtime.
        graph: the cpu block as an ONNX file.
    """

    block: str
    inputs: Arrays
    expected: RunResults
    got: RunResults
    graph: Path


def choose_block(bundle: BundleFiles, assignment: int) -> str:
    """The block that shows the most formats of an assignment; equals take turns from assignment to assignment."""
    row = dict(zip(bundle.policy.layers, bundle.policy.assignments[assignment], strict=True))
    shown = {
        block: len({name for layer, name in row.items() if layer.startswith(f"{block}.") and name in FORMATS})
        for block in bundle.index.blocks
    }
    best = [block for block, count in shown.items() if count == max(shown.values())]
    return best[assignment % len(best)]


def run_block(bundle: BundleFiles, assignment: int, block: str, feed: Arrays, folder: Path) -> BlockRun:
    """Cut a block out of both variants and run each.

    Args:
        bundle: with a target and a cpu graph for the assignment.
        assignment: index into the policy's assignments.
        block: module path.
        feed: inputs of the cpu graph, scales among them, for a few rows.
        folder: receives the cpu block as an ONNX file.

    Raises:
        AdatsqError: the variants do not share the block's border.
    """
    target = GraphView(bundle.graph_path(bundle.graph("target", assignment)))
    cpu = GraphView(bundle.graph_path(bundle.graph("cpu", assignment)))
    cut = find_cut(target, cpu, block)
    values = {**feed, **_values_inside(cpu, [name for name in cut.inputs if name in cpu.producers], feed)}
    inputs = [_input(target, name, values[name], bundle.index.base_type) for name in cut.inputs]
    rounded = {**values, **{value.name: _rounded(values[value.name], value) for value in inputs}}
    target_block = target.extract(inputs, cut.outputs)
    cpu_block = _cpu_block(cpu, cut, rounded)
    path = folder / f"assignment_{assignment:03d}.{block}.onnx"
    write_bytes(path, cpu_block.SerializeToString())
    cpu_inputs = {value.name: rounded[value.name] for value in cpu_block.graph.input}
    target_inputs = {value.name: rounded[value.name] for value in inputs}
    with quiet_polygraphy():
        expected = Comparator.run([ReferenceRunner(target_block, REFERENCE_NAME)], data_loader=[target_inputs])
    return BlockRun(block, cpu_inputs, expected, run_in_onnxruntime(path, [cpu_inputs]), path)


def _values_inside(cpu: GraphView, names: list[str], feed: Arrays) -> Mapping[str, np.ndarray]:
    """Values from the middle of the cpu graph, computed by ONNX Runtime."""
    if not names:
        return {}
    import onnxruntime

    model = ModelProto()
    model.CopyFrom(cpu.model)
    del model.graph.output[:]
    model.graph.output.extend(cpu.types.get(name) or ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(cpu.path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {name: feed[name] for name in cpu.inputs}), strict=True))


def _input(target: GraphView, name: str, value: np.ndarray, base_type: str) -> ValueInfoProto:
    """The declaration of a value that enters the target block, in the type that it has there."""
    known = target.types.get(name)
    kind = known.type.tensor_type.elem_type if known is not None else TensorProto.UNDEFINED
    if kind == TensorProto.UNDEFINED:
        floating = np.issubdtype(value.dtype, np.floating)
        kind = TensorProto.DataType.Value(_ONNX_NAMES[base_type]) if floating else np_dtype_to_tensor_dtype(value.dtype)
    return make_tensor_value_info(name, kind, [None] * value.ndim)


_ONNX_NAMES = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT"}


def _rounded(value: np.ndarray, declared: ValueInfoProto) -> np.ndarray:
    """A value as the target graph's type holds it, in the type that the cpu graph has."""
    kind = declared.type.tensor_type.elem_type
    return value.astype(tensor_dtype_to_np_dtype(kind)).astype(value.dtype) if kind in _FLOATS else value


def _cpu_block(cpu: GraphView, cut: Cut, values: Arrays) -> ModelProto:
    """The same block of the cpu graph."""
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

"""Extra plans that give what enters and leaves every block, so that a plan's blocks can be compared one by one.

Outputs keep the compiler from fusing what lies on both sides of them. So only the borders of blocks are marked: inside
of a block the plan is the one that runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from adatsq_trt.engines.accuracy.block_cut import load_graph
from adatsq_trt.engines.accuracy.blocks import BlockPair
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.rtx_steps import MarkedSteps
from adatsq_trt.engines.backends.selection import BackendChoice
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError
from adatsq_trt.formats import TARGETS

log = logging.getLogger(__name__)
_LAYOUTS = ("embedded", "shared")  # whose plans are of the graphs that are marked


@dataclass(frozen=True)
class MarkedRun:
    """One run of a marked plan.

    Attributes:
        backend: name of what ran it.
        values: name → float32 [rows, ...].
        failure: why there are none.
    """

    backend: str
    values: dict[str, np.ndarray] = field(default_factory=dict)
    failure: str | None = None


def run_marked(pair: BlockPair, step: int, choice: BackendChoice) -> MarkedRun | None:
    """Compile the target graph of an assignment with its blocks' borders as outputs, and run it.

    Args:
        pair: of the assignment; its feed is the plan's.
        step: of the assignment.
        choice: what runs the bundle; plans.

    Returns:
        None where no such plan can be compared: of other libraries than TensorRT-RTX, other layouts or several sizes.
    """
    bundle = pair.bundle
    if choice.name != RtxBackend.name or bundle.manifest.layout not in _LAYOUTS or bundle.manifest.shapes:
        log.info("'%s': plans are compared as a whole, block by block only %s", bundle.folder, " and ".join(_LAYOUTS))
        return None
    inputs = {signature.name: pair.feed[signature.name] for signature in bundle.row_inputs()}
    rows = len(next(iter(inputs.values())))
    try:
        names = border_names(pair)
        plan = build_marked_plan(pair, names, choice.plans[0].target, rows)
        name = f"assignment {pair.assignment}, marked"
        with MarkedSteps(bundle, plan, name, rows, names) as runner:
            return MarkedRun(choice.name, runner.values(step, inputs))
    except AdatsqError as error:
        return MarkedRun(choice.name, failure=str(error))
    except RuntimeError as error:  # PyTorch's and CUDA's: a second copy of the weights has to fit beside the first
        log.warning("assignment %d: its plan is compared as a whole only: %s", pair.assignment, error)
        return None


def border_names(pair: BlockPair) -> tuple[str, ...]:
    """Names of all values that enter or leave a block, but for inputs and outputs of the graph.

    Raises:
        AdatsqError: the variants do not share a block's border.
    """
    bundle = pair.bundle
    graph = bundle.assignment_graph("target", pair.assignment)
    known = {*pair.feed, *(signature.name for signature in graph.outputs)}
    cuts = [pair.border(block) for block in pair.blocks]
    return tuple(dict.fromkeys(name for cut in cuts for name in (*cut.inputs, *cut.outputs) if name not in known))


def build_marked_plan(pair: BlockPair, names: Sequence[str], target: str, rows: int) -> bytes:
    """Compile an assignment's target graph with more outputs, for TensorRT-RTX.

    Args:
        pair: of the assignment.
        names: of values in the graph.
        target: name of the GPU target.
        rows: of a call.

    Raises:
        AdatsqError: the compiler refuses the graph.
    """
    bundle = pair.bundle
    path = bundle.graph_path(bundle.assignment_graph("target", pair.assignment))
    with TemporaryDirectory(prefix="adatsq-marked-") as scratch:
        marked = write_marked(bundle, path, pair.declared(names), Path(scratch))
        return RtxBackend().build(marked, TARGETS[target], BatchRange(1, rows, rows))


def write_marked(bundle: BundleFiles, path: Path, values: Sequence[onnx.ValueInfoProto], folder: Path) -> Path:
    """Write a graph with more outputs; its weights stay where they are."""
    model = load_graph(path)
    model.graph.output.extend(values)
    (folder / bundle.index.weights).symlink_to(path.with_name(bundle.index.weights).resolve())
    marked = folder / path.name
    marked.write_bytes(model.SerializeToString(deterministic=True))
    return marked

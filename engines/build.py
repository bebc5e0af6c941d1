"""Compile a bundle's target graphs to plans, one for each target and assignment."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.backends.base import BatchRange, Compiler
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.bundle import GRAPH_FOLDER, PLAN_FOLDER, PlanFile, plan_path
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import read_json_model, sha256, write_bytes, write_json_model
from adatsq_trt.formats import Target
from adatsq_trt.graph_index import GraphFile, GraphIndex

log = logging.getLogger(__name__)
RECORD_NAME = "built.json"


class BuiltPlan(BaseModel):
    """What a plan was built from.

    Attributes:
        key: hash of everything that goes into it.
        sha256: hash of the plan itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    sha256: str


class BuildRecord(BaseModel):
    """Plans of the folder, so that a second build skips what is done.

    Attributes:
        plans: path relative to the bundle → what it was built from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    plans: dict[str, BuiltPlan] = {}


def build_plans(
    bundle_folder: Path,
    index: GraphIndex,
    targets: Sequence[Target],
    max_batch: int,
    on_plan: Callable[[int, int], None] | None = None,
    compiler: Compiler | None = None,
) -> tuple[PlanFile, ...]:
    """Compile every target graph for every GPU target; plans whose inputs are unchanged are kept.

    Args:
        bundle_folder: holds `onnx/`; receives `plans/`.
        index: the graphs.
        targets: `cpu` needs no plans and is passed over.
        max_batch: most rows (samples times guidance branches) that a plan accepts; it is tuned for that many.
        on_plan: called with (plans done, plans in all).
        compiler: TensorRT-RTX unless another is given.

    Returns:
        One entry per plan, by target and then by assignment.

    Raises:
        AdatsqError: the compiler refuses a graph.
        OutputError: the folder cannot be written.
    """
    compiler = compiler or RtxBackend()
    graphs = [graph for graph in index.graphs if graph.variant == "target" and graph.assignment is not None]
    jobs = [(target, graph) for target in targets if target.compute_capability is not None for graph in graphs]
    if not jobs:
        return ()
    compiler.require()
    batch = BatchRange(1, max_batch, max_batch)
    weights_hash = sha256(bundle_folder / GRAPH_FOLDER / index.weights)
    plans = []
    for done, (target, graph) in enumerate(jobs, start=1):
        plans.append(_build_plan(bundle_folder, graph, weights_hash, target, batch, compiler))
        if on_plan is not None:
            on_plan(done, len(jobs))
    return tuple(plans)


def _build_plan(
    folder: Path, graph: GraphFile, weights_hash: str, target: Target, batch: BatchRange, compiler: Compiler
) -> PlanFile:
    """Compile one graph unless its plan is there already."""
    assert graph.assignment is not None
    onnx_path, name = folder / GRAPH_FOLDER / graph.path, plan_path(target, graph.assignment)
    parts = [sha256(onnx_path), weights_hash, target.name, compiler.name, compiler.version(), repr(batch)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    record_path = folder / PLAN_FOLDER / target.name / RECORD_NAME
    record = _read_record(record_path)
    if not _is_built(folder / name, record.plans.get(name), key):
        write_bytes(folder / name, compiler.build(onnx_path, target, batch))
        built = BuiltPlan(key=key, sha256=sha256(folder / name))
        write_json_model(record_path, BuildRecord(plans=dict(sorted({**record.plans, name: built}.items()))))
    return PlanFile(target=target.name, assignment=graph.assignment, path=name, bytes=(folder / name).stat().st_size)


def _is_built(path: Path, built: BuiltPlan | None, key: str) -> bool:
    return built is not None and built.key == key and path.is_file() and sha256(path) == built.sha256


def _read_record(path: Path) -> BuildRecord:
    """What was built before; a damaged record only costs the time to build again."""
    if not path.is_file():
        return BuildRecord()
    try:
        return read_json_model(path, BuildRecord)
    except AdatsqError as error:
        log.warning("%s; building all plans of this target again", error)
        return BuildRecord()

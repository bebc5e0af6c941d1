"""Compile a bundle's target graphs to plans, arranged as a layout says."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.backends.base import BatchRange, Compiler
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.bundle import GRAPH_FOLDER, PLAN_FOLDER, Layout, PlanFile, plan_path
from adatsq_trt.engines.plan_weights import (
    STORE_NAME,
    Weight,
    name_all_weights,
    pack_plan,
    without_weights,
    write_store,
)
from adatsq_trt.engines.processes import processes
from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import read_json_model, sha256, write_bytes, write_json_model
from adatsq_trt.formats import PLUGIN_LAYOUT, Target
from adatsq_trt.graph_index import GraphFile, GraphIndex

log = logging.getLogger(__name__)
RECORD_NAME = "built.json"
_Compile: TypeAlias = Callable[[Path, Target, BatchRange], bytes]


class BuiltPlan(BaseModel):
    """Record of what a plan was built from.

    Attributes:
        key: hash of everything that goes into it.
        sha256: hash of the file.
        unpacked_bytes: size of the plan where the file holds it compressed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    sha256: str
    unpacked_bytes: int | None = None


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
    max_batch: int | BatchRange,
    on_plan: Callable[[int, int], None] | None = None,
    compiler: Compiler | None = None,
    layout: Layout = "embedded",
    jobs: int = 1,
) -> tuple[PlanFile, ...]:
    """Compile a layout's graphs for every GPU target; plans whose inputs are unchanged are kept, other plans removed.

    Args:
        bundle_folder: holds `onnx/`; receives `plans/`.
        index: the graphs.
        targets: `cpu` needs no plans and is passed over.
        max_batch: most rows (samples times guidance branches) that a plan accepts; it is tuned for that many. Or the
            optimization profiles.
        on_plan: called with (plans done, plans in all).
        compiler: TensorRT-RTX unless another is given.
        layout: "shared" writes the store beside the plans; "plugin" wants the profiles of `plugin_profiles` and a
            compiler that knows the plugin.
        jobs: compilers at a time, each in a process of its own when there are several; none is started for plans that
            are there already.

    Returns:
        One entry per plan, by target and then by assignment.

    Raises:
        AdatsqError: the compiler refuses a graph.
        OutputError: the folder cannot be written.
    """
    compiler = compiler or RtxBackend()
    together = layout in ("switch", PLUGIN_LAYOUT)
    graphs = [g for g in index.graphs if g.variant == "target" and (g.assignment is None) == together]
    work = [(target, graph) for target in targets if target.compute_capability is not None for graph in graphs]
    _remove_others(bundle_folder, [plan_path(target, graph.assignment, layout) for target, graph in work])
    if not work:
        return ()
    compiler.require()
    jobs = min(jobs, len(work))
    with _compile(compiler, jobs) as compile_graph, _mapping(jobs) as mapping:
        batch = max_batch if isinstance(max_batch, BatchRange) else BatchRange(1, max_batch, max_batch)
        plans = []
        job = _Job(bundle_folder, index, compiler, batch, layout, compile_graph)
        for done, plan in enumerate(mapping(lambda item: job.plan(*item), work), start=1):
            plans.append(plan)
            if on_plan is not None:
                on_plan(done, len(work))
    return tuple(plans)


@contextmanager
def _mapping(jobs: int) -> Iterator[Callable[..., Iterator[PlanFile]]]:
    """`map`, or one that works on several items at a time and begins no more after an error."""
    if jobs == 1:
        yield map
        return
    threads = ThreadPoolExecutor(jobs)
    try:
        yield threads.map
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def _compile(compiler: Compiler, jobs: int) -> Iterator[_Compile]:
    """`compiler.build`, in other processes when there are several jobs: it holds Python's lock while it works."""
    if jobs == 1:
        yield compiler.build
        return
    with processes(jobs) as pool:
        yield lambda path, target, batch: pool.submit(compiler.build, path, target, batch).result()


def _remove_others(folder: Path, wanted: Sequence[str]) -> None:
    """Take away what an earlier build left for other targets, assignments or layouts."""
    for path in [*(folder / PLAN_FOLDER).rglob("*.plan*"), folder / PLAN_FOLDER / STORE_NAME]:
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink(missing_ok=True)


class _Job:
    """Data that all plans of a build share."""

    def __init__(
        self,
        folder: Path,
        index: GraphIndex,
        compiler: Compiler,
        batch: BatchRange,
        layout: Layout,
        compile_graph: _Compile,
    ) -> None:
        self._folder, self._compiler, self._batch, self._layout = folder, compiler, batch, layout
        self._compile, self._recording = compile_graph, Lock()
        weights_file = folder / GRAPH_FOLDER / index.weights
        self._weights_hash = sha256(weights_file)
        self._names: Mapping[Weight, str] = {}
        if layout == "shared":
            self._names = name_all_weights(folder / GRAPH_FOLDER, index)
            write_store(folder / PLAN_FOLDER / STORE_NAME, weights_file, self._names)

    def plan(self, target: Target, graph: GraphFile) -> PlanFile:
        """Compile one graph unless its plan is there already."""
        packed = self._layout == "shared"
        folder, name = self._folder, plan_path(target, graph.assignment, self._layout)
        key, record_path = self._key(target, graph), folder / PLAN_FOLDER / target.name / RECORD_NAME
        built = _read_record(record_path).plans.get(name)
        if built is None or not _is_built(folder / name, built, key):
            with self._source(graph) as path:
                plan = self._compile(path, target, self._batch)
            write_bytes(folder / name, pack_plan(plan) if packed else plan)
            built = BuiltPlan(key=key, sha256=sha256(folder / name), unpacked_bytes=len(plan) if packed else None)
            with self._recording:
                plans = {**_read_record(record_path).plans, name: built}
                write_json_model(record_path, BuildRecord(plans=dict(sorted(plans.items()))))
        profiles = self._batch.profiles
        return PlanFile(
            target=target.name,
            assignment=graph.assignment,
            path=name,
            bytes=(folder / name).stat().st_size,
            unpacked_bytes=built.unpacked_bytes,
            max_rows=self._batch.maximum,
            profile_rows=tuple(profile.maximum for profile in profiles) if len(profiles) > 1 else (),
        )

    def _key(self, target: Target, graph: GraphFile) -> str:
        """Hash of everything that goes into a plan."""
        compiler, graph_hash = self._compiler, sha256(self._folder / GRAPH_FOLDER / graph.path)
        made_for = [target.name, self._layout, repr(self._batch)]
        parts = [graph_hash, self._weights_hash, compiler.name, compiler.version(), *made_for]
        parts += [compiler.settings] if compiler.settings else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @contextmanager
    def _source(self, graph: GraphFile) -> Iterator[Path]:
        """The graph that is compiled."""
        # Of a graph of plugin nodes the one without local functions: no parser can mistake these for the nodes.
        path = self._folder / GRAPH_FOLDER / (graph.plain_path or graph.path)
        if self._layout != "shared":
            yield path
            return
        with tempfile.TemporaryDirectory() as scratch:
            stripped = Path(scratch) / graph.path
            stripped.write_bytes(without_weights(path, self._names).SerializeToString(deterministic=True))
            yield stripped


def _is_built(path: Path, built: BuiltPlan, key: str) -> bool:
    return built.key == key and path.is_file() and sha256(path) == built.sha256


def _read_record(path: Path) -> BuildRecord:
    """Read the record of earlier builds; a damaged record only costs the time to build again."""
    if not path.is_file():
        return BuildRecord()
    try:
        return read_json_model(path, BuildRecord)
    except AdatsqError as error:
        log.warning("%s; building all plans of this target again", error)
        return BuildRecord()

"""What a bundle weighs in each layout, beside the least that its policy needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto
from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.bundle import REBUILD, BundleFiles, Layout
from adatsq_trt.engines.store import initializers, weight_of
from adatsq_trt.errors import DamagedFileError

LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch")


class LayoutSize(BaseModel):
    """One layout.

    Attributes:
        layout: its name.
        engines: how many plans it has for a target.
        weight_bytes: of the weights that all its plans and its store hold: what stays on the GPU beside activations.
        plan_overhead_bytes: target → what the plans hold besides, code above all; empty for a layout that is not built.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Layout
    engines: int
    weight_bytes: int
    plan_overhead_bytes: dict[str, int]


class SizeReport(BaseModel):
    """All layouts.

    Attributes:
        floor_bytes: distinct (layer, format) weights and everything that is not quantized, each once.
        layouts: the one that is built among them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    floor_bytes: int
    layouts: tuple[LayoutSize, ...]


def size_report(files: BundleFiles) -> SizeReport | None:
    """Weigh a bundle; None when it has no target graphs, since then nothing of it goes to a GPU."""
    graphs = [g for g in files.index.graphs if g.variant == "target" and g.assignment is not None]
    if not graphs:
        return None
    floor = constant_bytes(files.graph_path(files.graph("target", None)))
    embedded = sum(constant_bytes(files.graph_path(graph)) for graph in graphs)
    weights: dict[Layout, int] = {"embedded": embedded, "shared": floor, "switch": floor}
    return SizeReport(
        floor_bytes=floor,
        layouts=tuple(
            LayoutSize(
                layout=layout,
                engines=1 if layout == "switch" else len(graphs),
                weight_bytes=weights[layout],
                plan_overhead_bytes=_overhead(files, layout, weights[layout]),
            )
            for layout in LAYOUTS
        ),
    )


def constant_bytes(path: Path) -> int:
    """Bytes of the constants that a graph and its subgraphs read, those in the weight file and those in the graph.

    Raises:
        DamagedFileError: the file is not an ONNX graph, or says nonsense about its weights.
    """
    try:
        graph: GraphProto = onnx.load(path, load_external_data=False).graph
        large = {weight for tensor in initializers(graph) if (weight := weight_of(tensor)) is not None}
    except (DecodeError, ValueError) as error:
        raise DamagedFileError(f"'{path}' is not a sound ONNX graph: {error}; {REBUILD}") from error
    small = sum(len(tensor.raw_data) for tensor in initializers(graph))
    return sum(weight.length for weight in large) + small


def _overhead(files: BundleFiles, layout: Layout, weight_bytes: int) -> dict[str, int]:
    if layout != files.manifest.layout:
        return {}
    # Plans of layout `shared` hold no weights.
    inside = 0 if layout == "shared" else weight_bytes
    return {target: size - inside for target, size in _plan_bytes(files)}


def _plan_bytes(files: BundleFiles) -> Iterator[tuple[str, int]]:
    for target in dict.fromkeys(plan.target for plan in files.manifest.plans):
        yield target, sum(plan.bytes for plan in files.manifest.plans if plan.target == target)

"""Size of a bundle in each layout, beside the least that its policy needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, TensorProto
from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.bundle import REBUILD, BundleFiles, Layout
from adatsq_trt.engines.plan_weights import initializers, weight_of
from adatsq_trt.errors import DamagedFileError

_PLUGIN_NODE = "AdatsqLinear"
LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch")


class LayoutSize(BaseModel):
    """One layout.

    Attributes:
        layout: its name.
        engines: how many plans it has for a target.
        weight_bytes: of the weights that all its plans and its store hold, which stay on the GPU beside activations.
        branches: of layout `switch`: alternatives of its layers, each with code of its own in the one plan.
        plan_bytes: target → all plans, as they are stored; empty for a layout that is not built.
        plan_overhead_bytes: target → what the plans hold beside weights, code above all; empty likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Layout
    engines: int
    weight_bytes: int
    branches: int = 0
    plan_bytes: dict[str, int] = {}
    plan_overhead_bytes: dict[str, int]


class OperandSize(BaseModel):
    """One kind of weight input of plugin nodes; docs/plugin.md says what each is.

    Attributes:
        name: such as "w8"; a layer with a "lo" is nested.
        layers: how many have it.
        bytes: of all of them; each is stored once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: int
    bytes: int


class SizeReport(BaseModel):
    """All layouts.

    Attributes:
        floor_bytes: distinct (layer, weight grid) weights and everything that is not quantized, each once.
        layouts: the one that is built among them; `plugin` stands alone, as it has a graph of its own.
        operands: of layout `plugin`: types and bytes of its layers' weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    floor_bytes: int
    layouts: tuple[LayoutSize, ...]
    operands: tuple[OperandSize, ...] = ()


def size_report(files: BundleFiles) -> SizeReport | None:
    """Weigh a bundle; None when it has no target graphs, since then nothing of it goes to a GPU."""
    targets = [graph for graph in files.index.graphs if graph.variant == "target"]
    if not targets:
        return None
    together = files.graph_path(files.graph("target", None))
    floor = sum(constant_bytes(files.graph_path(graph)) for graph in targets if graph.assignment is None)
    if files.manifest.layout == "plugin":
        only = LayoutSize(layout="plugin", engines=1, weight_bytes=floor, plan_overhead_bytes={})
        return SizeReport(floor_bytes=floor, layouts=(only,), operands=operand_sizes(together))
    own = [files.graph_path(graph) for graph in targets if graph.assignment is not None]
    embedded = sum(map(constant_bytes, own))
    weights: dict[Layout, int] = {"embedded": embedded, "shared": floor, "switch": floor}
    return SizeReport(
        floor_bytes=floor,
        layouts=tuple(
            LayoutSize(
                layout=layout,
                engines=1 if layout == "switch" else len(own),
                weight_bytes=weights[layout],
                branches=_branches(files) if layout == "switch" else 0,
                plan_bytes=dict(_plan_bytes(files)) if layout == files.manifest.layout else {},
                plan_overhead_bytes=_overhead(files, layout, weights[layout]),
            )
            for layout in LAYOUTS
            if layout != "switch" or len(files.experts) == 1  # one plan would hold both transformers
        ),
    )


def constant_bytes(path: Path) -> int:
    """Bytes of the constants that a graph and its subgraphs read, those in the weight file and those in the graph.

    Constants that formats of a layer share count once: places in the weight file, and small ones that are the same in
    several branches.

    Raises:
        DamagedFileError: the file is not an ONNX graph, or says nonsense about its weights.
    """
    try:
        graph: GraphProto = onnx.load(path, load_external_data=False).graph
        large = {weight for tensor in initializers(graph) if (weight := weight_of(tensor)) is not None}
    except (DecodeError, ValueError) as error:
        raise DamagedFileError(f"'{path}' is not a sound ONNX graph: {error}; {REBUILD}") from error
    small = {(tensor.name.partition("@")[0], tensor.raw_data) for tensor in initializers(graph)}
    return sum(weight.length for weight in large) + sum(len(content) for _, content in small)


def operand_sizes(path: Path) -> tuple[OperandSize, ...]:
    """The weight inputs of a graph's plugin nodes, by name."""
    graph: GraphProto = onnx.load(path, load_external_data=False).graph
    sizes = {tensor.name: _size(tensor) for tensor in graph.initializer}
    layers, total = Counter[str](), Counter[str]()
    for node in graph.node:
        names = [a.s.decode().split(",") for a in node.attribute if (node.op_type, a.name) == (_PLUGIN_NODE, "inputs")]
        for name, value in zip(names[0] if names else (), node.input, strict=False):
            if value in sizes:
                layers[name] += 1
                total[name] += sizes[value]
    return tuple(OperandSize(name=name, layers=count, bytes=total[name]) for name, count in sorted(layers.items()))


def _size(tensor: TensorProto) -> int:
    weight = weight_of(tensor)
    return len(tensor.raw_data) if weight is None else weight.length


def _branches(files: BundleFiles) -> int:
    """Formats of the layers that have several."""
    named = ([name for name in column if name is not None] for column in zip(*files.policy.assignments, strict=True))
    formats = (len(set(column)) for column in named)
    return sum(count for count in formats if count > 1)


def _overhead(files: BundleFiles, layout: Layout, weight_bytes: int) -> dict[str, int]:
    if layout != files.manifest.layout:
        return {}
    # Plans of layout `shared` hold no weights.
    inside = 0 if layout == "shared" else weight_bytes
    return {target: size - inside for target, size in _plan_bytes(files)}


def _plan_bytes(files: BundleFiles) -> Iterator[tuple[str, int]]:
    for target in dict.fromkeys(plan.target for plan in files.manifest.plans):
        yield target, sum(plan.bytes for plan in files.manifest.plans if plan.target == target)

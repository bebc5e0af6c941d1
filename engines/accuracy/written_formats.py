"""In which formats a graph says that it computes its layers: the exporter writes them down at the nodes."""

from __future__ import annotations

from adatsq_trt.engines.accuracy.block_cut import load_graph, module_of
from adatsq_trt.engines.bundle import BundleFiles

_FORMAT_KEY = "adatsq.format"


def written_formats(bundle: BundleFiles, variant: str, step: int) -> dict[str, list[str]]:
    """Read each layer's formats as a step's graph was written, in the order of execution; several where it switches."""
    graph = bundle.assignment_graph(variant, bundle.policy.step_assignments[step])
    nodes = load_graph(bundle.graph_path(graph)).graph.node
    formats = ((module_of(node), {e.key: e.value for e in node.metadata_props}.get(_FORMAT_KEY)) for node in nodes)
    return {layer: names.split(",") for layer, names in formats if names is not None}


def mismatched_layer(bundle: BundleFiles, variant: str, step: int) -> str | None:
    """The first layer, in the order of execution, that a step's graph has in another format than the policy."""
    formats = bundle.policy.formats_at(step)
    for layer, names in written_formats(bundle, variant, step).items():
        if layer in formats and formats[layer].name not in names:
            return layer
    return None

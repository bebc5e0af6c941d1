"""Whether the constants of a bundle's graphs, in the graphs and in the weight file, are what the exporter had."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.numpy_helper import to_array

from adatsq_trt.engines.accuracy.block_cut import load_graph
from adatsq_trt.engines.bundle import GRAPH_FOLDER, BundleFiles
from adatsq_trt.engines.plan_weights import initializers
from adatsq_trt.graph_index import ConstantHashes, GraphFile, constant_hash, constant_key

_CHUNK_BYTES = 1 << 24


def constants_difference(bundle: BundleFiles, variant: str, hashes: ConstantHashes) -> str | None:
    """Find the first constant that is not the exporter's, in any graph of a variant.

    Args:
        bundle: opened.
        variant: of the graphs.
        hashes: of the exporter's constants.

    Returns:
        A sentence; None where all are the same.

    Raises:
        AdatsqError: a file is not an ONNX graph.
    """
    expected, seen = hashes.variants[variant], set[str]()
    weights = _WeightFile(bundle.folder / GRAPH_FOLDER / bundle.index.weights)
    for graph in (graph for graph in bundle.index.graphs if graph.variant == variant):
        formats = _formats(bundle, graph)
        for path in (path for path in (graph.path, graph.plain_path) if path is not None):
            for tensor in initializers(load_graph(bundle.folder / GRAPH_FOLDER / path).graph):
                key = constant_key(tensor.name, formats)
                seen.add(key)
                if constant_hash(tensor.data_type, tensor.dims, weights.digest(tensor)) != expected.get(key):
                    return f"'{path}': constant '{tensor.name}' is not what the exporter had"
    lost = sorted(expected.keys() - seen)
    return f"no {variant} graph holds the constant '{lost[0]}', which the exporter had" if lost else None


def _formats(bundle: BundleFiles, graph: GraphFile) -> Mapping[str, str]:
    """Module path → format, of layers that have one format in a graph."""
    if graph.variant == "reference":
        return {}
    rows = bundle.policy.rows if graph.assignment is None else [bundle.policy.rows[graph.assignment]]
    columns: dict[str, set[str]] = {}
    for row in rows:
        for layer, name in row.items():
            columns.setdefault(layer, set()).add(name)
    return {layer: next(iter(names)) for layer, names in columns.items() if len(names) == 1}


class _WeightFile:
    """Hashes of places in the one weight file, each read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[int, int], bytes] = {}

    def digest(self, tensor: TensorProto) -> bytes:
        """sha256 of a constant's bytes; of none where it lies in another file."""
        if not uses_external_data(tensor):
            return hashlib.sha256(tensor.raw_data or to_array(tensor).tobytes()).digest()
        place = ExternalDataInfo(tensor)
        if place.location != self._path.name or place.length is None:
            return b""
        key = (place.offset or 0, place.length)
        if key not in self._known:
            self._known[key] = self._read(*key)
        return self._known[key]

    def _read(self, offset: int, length: int) -> bytes:
        digest = hashlib.sha256()
        with self._path.open("rb") as file:
            file.seek(offset)
            while length > 0 and (chunk := file.read(min(length, _CHUNK_BYTES))):
                digest.update(chunk)
                length -= len(chunk)
        return digest.digest()

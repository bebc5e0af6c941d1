"""A hash of every constant of the graphs, of what the exporter was given and not of what it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.conditions import with_subgraphs
from adatsq_trt.graph_index import ConstantHashes, constant_hash, constant_key


class HashedConstants:
    """Collects the constants of all graphs of an export."""

    def __init__(self, stored: Mapping[int, bytes]) -> None:
        """Start with none.

        Args:
            stored: offset in the weight file → sha256 of the content that was put there.
        """
        self._stored = stored
        self._variants: dict[str, dict[str, str]] = {}

    def add(self, model: onnx.ModelProto, variant: str, formats: Mapping[str, str]) -> None:
        """Take in a graph's constants.

        Args:
            model: about to be written, large constants outside.
            variant: of the graph.
            formats: module path → format, of layers that have one format in this graph.

        Raises:
            AdatsqError: two graphs of a variant have different constants under one name.
        """
        known = self._variants.setdefault(variant, {})
        for tensor in (tensor for graph in with_subgraphs(model.graph) for tensor in graph.initializer):
            key = constant_key(tensor.name, formats)
            got = constant_hash(tensor.data_type, tensor.dims, self._digest(tensor))
            if known.setdefault(key, got) != got:
                raise AdatsqError(f"the exporter wrote different constants '{key}' in two {variant} graphs")

    def _digest(self, tensor: onnx.TensorProto) -> bytes:
        if uses_external_data(tensor):
            return self._stored[ExternalDataInfo(tensor).offset or 0]
        return hashlib.sha256(tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()).digest()

    @property
    def record(self) -> ConstantHashes:
        """All of them, for the file beside the index."""
        return ConstantHashes(variants=self._variants)

"""Pass: an assignment's target graph loses its formats, so that other ones can be inserted.

Before: what `insert_qdq` left of a graph without transforms. Weights come from the reference graph of the same export.

Rules:
    1. W takes the place of what makes a layer's weight, as a constant [K, N] in the base type.
    2. x takes the place of what `insert_qdq` made of it; scale inputs go with it.
    3. A Cast behind a MatMul that computed in another type is left out.

The result is what `normalize_linears` starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes import common

from adatsq_trt.export.emitter import BASE_TYPES, Emitter
from adatsq_trt.export.insert_qdq import FORMAT, SCALE_SUFFIX
from adatsq_trt.export.normalize_linears import find_linears, weight_of

_OF_INPUTS = ("CastInput", "ScaleInput", "QuantizeInput", "DequantizeInput")


class RemoveQdq(ir.passes.InPlacePass):
    """Take formats out; see the rules above."""

    def __init__(self, weights: Mapping[str, ir.TensorProtocol], base: DataType) -> None:
        """Set the pass up.

        Args:
            weights: module path → weight [N, K].
            base: type of everything that is not quantized.
        """
        super().__init__()
        self._weights, self._base = weights, base

    def requires(self, model: ir.Model) -> None:
        """Every layer is as `insert_qdq` leaves it."""
        find_linears(model, list(self._weights))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 3."""
        for layer, linear in find_linears(model, list(self._weights)).items():
            constant = _turned(self._weights[layer], self._base)
            linear.replace_input_with(1, Emitter(linear, f"{layer}.").constant("turned_weight", constant))
            linear.replace_input_with(0, _input(layer, linear))
            _drop_cast(layer, linear, self._base)
            linear.metadata_props.pop(FORMAT, None)
        common.RemoveUnusedNodesPass()(model)
        for value in list(model.graph.inputs):
            if str(value.name).endswith(f".{SCALE_SUFFIX}") and not value.uses():
                model.graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=bool(self._weights))

    def ensures(self, model: ir.Model) -> None:
        """Nothing of a format is left."""
        kept = [value.name for value in model.graph.inputs if str(value.name).endswith(f".{SCALE_SUFFIX}")]
        kept += [node.name for node in model.graph if FORMAT in node.metadata_props]
        if kept:
            raise ir.passes.PostconditionError(f"'{kept[0]}' is left of a format")


def _turned(weight: ir.TensorProtocol, base: DataType) -> ir.LazyTensor:
    """Rule 1: [K, N], read when it is written."""
    rows, columns = (int(size) for size in weight.shape.numpy())

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(weight.numpy().T.astype(base.numpy())), base)

    return ir.LazyTensor(read, base, ir.Shape([columns, rows]))


def _input(layer: str, linear: ir.Node) -> ir.Value:
    """Rule 2."""
    value, names = linear.inputs[0], {f"{layer}/{name}" for name in _OF_INPUTS}
    while value is not None and (node := value.producer()) is not None and node.name in names:
        value = node.inputs[0]
    assert value is not None
    return value


def _drop_cast(layer: str, linear: ir.Node, base: DataType) -> None:
    """Rule 3."""
    product = linear.outputs[0]
    for user, _ in list(product.uses()):
        if user.name == f"{layer}/CastOutput":
            ir.convenience.replace_all_uses_with(user.outputs[0], product)
    product.type = ir.TensorType(base)


def read_weights(reference: Path, layers: Sequence[str]) -> dict[str, ir.TensorProtocol]:
    """Module path → weight [N, K] as stored, read when it is asked for.

    Args:
        reference: full-precision graph of an export.
        layers: module paths.

    Raises:
        AdatsqError: a layer is not in it.
    """
    found = {}
    for layer, linear in find_linears(ir.load(reference), layers).items():
        value = weight_of(linear)
        wide = value.producer()  # small weights are stored wide, large ones widened when the graph runs
        stored = value if wide is None else wide.inputs[0]
        assert stored is not None and stored.const_value is not None
        found[layer] = stored.const_value
    return found


def read_template(target: Path, weights: Mapping[str, ir.TensorProtocol], base: str) -> ir.Model:
    """The graph that was traced, from an assignment's target graph without transforms.

    Args:
        target: its file.
        weights: of `read_weights`.
        base: name of the type of everything that is not quantized.

    Raises:
        AdatsqError: a layer is not in it.
    """
    model = ir.load(target)
    RemoveQdq(weights, BASE_TYPES[base])(model)
    return model

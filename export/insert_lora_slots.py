"""Pass: every linear layer gets a branch of low rank whose matrices are inputs of the graph, for LoRAs at run time.

Before: MatMul(x, Transpose(W)) [+ Add(bias)] in the base type (`normalize_linears`), and nothing else: transforms and
Q/DQ come afterwards, so the branch reads what the layer is given in full precision, and a LoRA means what it meant in
training.

Rules:
    1. y + (x · down) · up: two MatMuls beside the layer and one Add behind it and its bias, in the type of its output.
       What they give is "<module path>.lora", the layer's own result becomes "<module path>.without_lora", and the sum
       is "<module path>.output".
    2. down [K, rank] and up [rank, N] are the graph inputs "lora.<module path>.down" and "lora.<module path>.up".
    3. The nodes belong to the module "<module path>.lora": where a layer switches between formats (`switch`), they stay
       outside of the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from adatsq_trt.export.emitter import Emitter
from adatsq_trt.export.insert_transforms import insert_beside
from adatsq_trt.export.normalize_linears import find_linears, last_node, weight_of
from adatsq_trt.graph_index import lora_inputs


class InsertLoraSlots(ir.passes.InPlacePass):
    """Put a branch beside every layer; see the rules above."""

    def __init__(self, layers: Sequence[str], rank: int) -> None:
        """Set the pass up.

        Args:
            layers: module paths.
            rank: of all branches.
        """
        super().__init__()
        self._layers, self._rank = layers, rank

    def requires(self, model: ir.Model) -> None:
        """Every layer is in the one form that the rules start from."""
        find_linears(model, self._layers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply rules 1 to 3."""
        for layer, linear in find_linears(model, self._layers).items():
            x, shape = linear.inputs[0], weight_of(linear).shape
            kind = last_node(layer, linear).outputs[0].dtype
            assert x is not None and shape is not None and kind is not None
            rows, columns = (int(size) for size in shape.numpy())
            emit, (down, up) = Emitter(linear, ""), lora_inputs(layer)
            matrices = (
                emit.graph_input(down, kind, (columns, self._rank)),
                emit.graph_input(up, kind, (self._rank, rows)),
            )
            insert_beside(layer, linear, (x, *matrices), "lora", "without_lora")
        return ir.passes.PassResult(model, modified=bool(self._layers))

    def ensures(self, model: ir.Model) -> None:
        """Every layer has both inputs, each read once."""
        inputs = {value.name: value for value in model.graph.inputs}
        for name in (name for layer in self._layers for name in lora_inputs(layer)):
            if name not in inputs or len(inputs[name].uses()) != 1:
                raise ir.passes.PostconditionError(f"input '{name}' is not there, or not read once")

"""Small tools for writing nodes into a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.export.name_nodes import MODULE

TRT_DOMAIN = "trt"
BASE_TYPES = {"bfloat16": DataType.BFLOAT16, "float16": DataType.FLOAT16, "float32": DataType.FLOAT}
SIXTEEN_BIT = (DataType.BFLOAT16, DataType.FLOAT16)


class Emitter:
    """Writes nodes beside an anchor; they carry the anchor's module path and names that begin with a prefix."""

    def __init__(self, anchor: ir.Node, prefix: str, after: bool = False, module: str | None = None) -> None:
        """Start writing.

        Args:
            anchor: the node beside which new nodes go.
            prefix: of the names of nodes, values and constants.
            after: write one node after the anchor instead of any number before it.
            module: the module path that nodes carry; None for the anchor's.
        """
        assert isinstance(anchor.graph, ir.Graph)
        self._anchor, self._prefix, self._after = anchor, prefix, after
        self._module = anchor.metadata_props.get(MODULE, "") if module is None else module
        self._graph = anchor.graph

    def renamed(self, prefix: str) -> Emitter:
        """The same place with another prefix."""
        return Emitter(self._anchor, prefix, self._after, self._module)

    def node(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtypes: Sequence[DataType],
        domain: str = "",
        **attributes: int | float | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Add a node with one output for each of `dtypes`."""
        full = f"{self._prefix}{name}"
        outputs = [
            ir.val(f"{full}.out{i or ''}", type=ir.TensorType(dtype), shape=None) for i, dtype in enumerate(dtypes)
        ]
        metadata = {MODULE: self._module}
        new = ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=full, metadata_props=metadata)
        insert = self._graph.insert_after if self._after else self._graph.insert_before
        insert(self._anchor, new)
        return outputs

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: DataType,
        **attributes: int | float | Sequence[int],
    ) -> ir.Value:
        """Add a standard node with one output."""
        return self.node(name, op_type, inputs, [dtype], "", **attributes)[0]

    def cast(self, name: str, value: ir.Value, dtype: DataType) -> ir.Value:
        """Add a Cast."""
        return self.op(name, "Cast", [value], dtype, to=dtype.value)

    def constant(self, name: str, content: ir.TensorProtocol) -> ir.Value:
        """Add an initializer."""
        value = ir.val(
            f"{self._prefix}{name}", type=ir.TensorType(content.dtype), shape=ir.Shape(content.shape.numpy())
        )
        value.const_value = content
        self._graph.register_initializer(value)
        return value

    def numbers(self, name: str, numbers: Sequence[float]) -> ir.Value:
        """Add a float32 vector initializer."""
        return self.constant(name, ir.tensor(np.asarray(numbers, np.float32)))

    def number(self, name: str, number: float, dtype: DataType = DataType.FLOAT) -> ir.Value:
        """Add a scalar initializer."""
        return self.constant(name, ir.tensor(np.asarray(number, dtype.numpy()), dtype))

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Add an int64 vector initializer: axes and shapes."""
        return self.constant(name, ir.tensor(np.asarray(numbers, np.int64)))

    def graph_input(self, name: str, dtype: DataType, shape: Sequence[int] = ()) -> ir.Value:
        """Add an input to the graph; a scalar unless it has a shape."""
        value = ir.val(f"{self._prefix}{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value

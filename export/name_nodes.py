"""Pass: nodes and parameters are called by the module that they come from.

Rules:
    1. A node that the exporter gave a scope gets the metadata MODULE: its module path, without the trace wrapper's
       prefix; none where the exporter itself added it. Every other remark of the exporter (source lines, stack
       traces) is dropped.
    2. A node without a scope belongs to the module of the node that makes its first input.
    3. A node is called "<module path>/<operator>"; the second of a kind gets a number.
    4. Parameters lose the trace wrapper's prefix.
    5. Of one of several models, module paths and constants begin with its name, so that those of two never meet.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

MODULE = "adatsq.module"
_EXPORTER_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # how torch.export calls what it added by itself


class NameNodes(ir.passes.InPlacePass):
    """Name nodes by module path; see the rules above."""

    def __init__(self, prefix: str, model: str = "") -> None:
        """Set the pass up.

        Args:
            prefix: prefix of module paths in the trace wrapper, with its dot, or "".
            model: name of one of several models, or "".
        """
        super().__init__()
        self._prefix, self._own = prefix, f"{model}." if model else ""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply all rules."""
        counts: Counter[str] = Counter()
        for node in model.graph:
            path = self._module_path(node)
            node.metadata_props.clear()
            node.metadata_props[MODULE] = path
            name = f"{path}/{node.op_type}" if path else node.op_type
            counts[name] += 1
            node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
            for value in node.outputs:
                value.metadata_props.clear()
        for value in [*model.graph.inputs, *model.graph.initializers.values()]:
            value.metadata_props.clear()
            if value.name and (self._prefix or self._own) and not value.is_graph_input():
                value.name = f"{self._own}{value.name.removeprefix(self._prefix)}"
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Names are unique, and every node knows its module."""
        names = Counter(node.name for node in model.graph)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated or any(MODULE not in node.metadata_props for node in model.graph):
            raise ir.passes.PostconditionError(f"node names are not unique: {repeated[:3]}")

    def _module_path(self, node: ir.Node) -> str:
        """Rules 1 and 2. The exporter lists the scopes from the root inwards; the last one is the operation."""
        scopes = node.metadata_props.get(_EXPORTER_SCOPES)
        if scopes is not None:
            enclosing = ast.literal_eval(scopes)[:-1]
            path = str(enclosing[-1]) if enclosing else ""
            if path in ("", self._prefix.rstrip("."), _NO_MODULE):
                return ""
            return f"{self._own}{path.removeprefix(self._prefix)}"
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None:
                return producer.metadata_props[MODULE]
        return ""

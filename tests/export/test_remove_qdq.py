import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from adatsq_trt.export.encode import encode_weight
from adatsq_trt.export.insert_qdq import InsertQdq
from adatsq_trt.export.normalize_linears import NormalizeLinears, find_linears
from adatsq_trt.export.remove_qdq import RemoveQdq
from adatsq_trt.export.weight_store import ExternalData
from adatsq_trt.formats import TARGETS, format_named
from adatsq_trt.graph_index import WEIGHTS_NAME
from adatsq_trt.quantizers import quantize_nearest

LAYER = "up"
FORMATS = sorted(frozenset().union(*(target.formats for target in TARGETS.values() if target.compute_capability)))


def described(model: ir.Model) -> list[str]:
    """Nodes with what they read, and inputs, of a graph whose names are those of the exporter."""
    nodes = [f"{n.name}: {n.op_type} of {[v.name for v in n.inputs if v is not None]}" for n in model.graph]
    return sorted([*nodes, *(f"input {value.name}: {value.dtype}" for value in model.graph.inputs)])


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_inserted_is_gone(traced_toy, toy_layers, tmp_path, name):
    before = traced_toy.clone()
    NormalizeLinears([LAYER])(before)
    model, weight = before.clone(), toy_layers[LAYER].weight.detach()
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        store = ExternalData(file, tmp_path)
        encoded = encode_weight(
            quantize_nearest(weight, format_named(name)), format_named(name), DataType.BFLOAT16, store
        )
    InsertQdq({LAYER: format_named(name)}, {LAYER: encoded}, DataType.BFLOAT16)(model)
    if name != "bf16":
        assert described(model) != described(before)

    RemoveQdq({LAYER: ir.tensor(weight.numpy())}, DataType.BFLOAT16)(model)
    linears = [node for node in model.graph if node.op_type == "MatMul" and node.name == f"{LAYER}/MatMul"]
    content = linears[0].inputs[1].const_value
    assert (content.dtype, tuple(content.shape)) == (DataType.BFLOAT16, tuple(weight.T.shape))
    np.testing.assert_array_equal(content.numpy().astype(np.float32), weight.T.bfloat16().float().numpy())

    NormalizeLinears([LAYER])(model)
    find_linears(model, [LAYER])
    assert described(model) == described(before)

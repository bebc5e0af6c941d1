"""How often a layer's rounding counts in the values behind it."""

from pathlib import Path

import onnx.parser
import pytest

from adatsq_trt.engines.accuracy.block_cut import GraphView
from adatsq_trt.engines.accuracy.rounded_layers import count_rounded_layers

LAYERS = ("q", "k", "out", "w1", "w3", "w2")
GATED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,2] x, float[2] scale) => (float[2,2] y) <float[2,2] w = {1, 0, 0, 1}> {
    q_output = MatMul(x, w)
    k_output = MatMul(x, w)
    product = MatMul(q_output, k_output)
    out_output = MatMul(product, w)
    modulated = Mul(out_output, scale)
    residual = Add(x, modulated)
    w1_output = MatMul(residual, w)
    sigmoid = Sigmoid(w1_output)
    silu = Mul(w1_output, sigmoid)
    w3_output = MatMul(residual, w)
    gated = Mul(silu, w3_output)
    w2_output = MatMul(gated, w)
    y = Add(residual, w2_output)
}"""


@pytest.fixture
def counts(tmp_path: Path) -> dict[str, int]:
    path = tmp_path / "block.onnx"
    # The parser takes no dots in names.
    path.write_bytes(onnx.parser.parse_model(GATED).SerializeToString().replace(b"_output", b".output"))
    return count_rounded_layers(GraphView(path), LAYERS)


def test_layers_one_behind_the_other_are_counted(counts: dict[str, int]) -> None:
    assert [counts[f"{layer}.output"] for layer in ("q", "k", "out", "w1", "w3")] == [1, 1, 2, 3, 3]


def test_an_activation_function_is_no_gate(counts: dict[str, int]) -> None:
    """It multiplies a layer's output with a function of the same output."""
    assert counts["silu"] == counts["w1.output"]


def test_neither_is_a_product_with_what_no_layer_gave(counts: dict[str, int]) -> None:
    assert counts["modulated"] == counts["out.output"]


def test_a_gate_has_the_errors_of_both_factors(counts: dict[str, int]) -> None:
    assert counts["gated"] == counts["w1.output"] + counts["w3.output"]
    assert counts["w2.output"] == counts["y"] == 7


def test_what_lies_before_the_block_does_not_count(tmp_path: Path, counts: dict[str, int]) -> None:
    assert "x" not in counts
    later = count_rounded_layers(GraphView(tmp_path / "block.onnx"), LAYERS[3:])
    assert later["w1.output"] == 1
    assert later["w2.output"] == 3

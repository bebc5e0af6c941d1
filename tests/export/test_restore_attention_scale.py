import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from adatsq_trt.export.restore_attention_scale import RestoreAttentionScale


def attention(width: int, scale: float, softmax: str = "Softmax", masked: bool = False) -> ir.Model:
    made = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (bfloat16[b,5,{width}] q, bfloat16[b,{width},5] k, bfloat16[b,1,5] mask) => (bfloat16[b,5,5] y)
        <bfloat16[1] c> {{
            a = Mul(q, c)
            s = Mul(k, c)
            logits = MatMul(a, s)
            {"seen = Add(logits, mask)" if masked else ""}
            y = {softmax}({"seen" if masked else "logits"})
        }}"""
    )
    c = next(iter(made.graph)).inputs[1]
    c.const_value = ir.tensor(np.asarray([scale], DataType.BFLOAT16.numpy()), DataType.BFLOAT16)
    made.graph.register_initializer(c)
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 128])
def test_rule_1_a_rounded_scale_becomes_exact(width, masked):
    made = attention(width, width**-0.25, masked=masked)
    RestoreAttentionScale()(made)
    value = made.graph.initializers["c"].const_value
    assert value.dtype == DataType.FLOAT
    assert value.numpy()[0] == np.float32(width**-0.25)


@pytest.mark.parametrize(
    "made",
    [
        attention(128, 0.5),
        attention(128, 128**-0.25, softmax="Relu"),
        attention(128, 128**-0.25, softmax="Relu", masked=True),
    ],
)
def test_other_constants_stay(made):
    assert not RestoreAttentionScale()(made).modified
    assert made.graph.initializers["c"].const_value.dtype == DataType.BFLOAT16

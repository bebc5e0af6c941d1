import numpy as np
import pytest
import torch
from onnx_ir import DataType

from adatsq_trt.export.encode import encode_weight
from adatsq_trt.export.weight_store import ExternalData
from adatsq_trt.formats import FORMATS, Granularity
from adatsq_trt.graph_index import WEIGHTS_NAME
from adatsq_trt.quantizers import dequantize_weight, quantize_nearest


@pytest.mark.parametrize("base", [DataType.BFLOAT16, DataType.FLOAT16, DataType.FLOAT])
@pytest.mark.parametrize("name", list(FORMATS))
def test_stored_codes_and_scales_give_the_dequantized_weight(tmp_path, name, base):
    """ONNX's own reading of the stored bytes, multiplied out, is `dequantize_weight` bit for bit."""
    fmt = FORMATS[name]
    weight = quantize_nearest(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05, fmt)
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        encoded = encode_weight(weight, fmt, base, ExternalData(file, tmp_path))
    values = encoded.codes.tensor().numpy().astype(np.float32)
    if encoded.scales is not None:
        scales = encoded.scales.tensor().numpy().astype(np.float32).reshape(48, -1)
        assert encoded.scales.shape == ((48,) if fmt.weight.granularity is Granularity.CHANNEL else scales.shape)
        if encoded.global_scale is not None:
            scales = scales * np.float32(encoded.global_scale)
        values = values * scales.repeat(128 // scales.shape[1], axis=1)
    np.testing.assert_array_equal(values, dequantize_weight(weight, fmt).numpy())


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4), ("int4wo", 4), ("w3a3", 4), ("w5a5", 8), ("fp8", 8)])
def test_codes_are_packed(tmp_path, name, bits):
    weight = quantize_nearest(torch.randn(64, 64), FORMATS[name])
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        encoded = encode_weight(weight, FORMATS[name], DataType.BFLOAT16, ExternalData(file, tmp_path))
    assert encoded.codes.length == 64 * 64 * bits // 8

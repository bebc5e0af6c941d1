"""What overflows a plain 16-bit format is refused with its layer."""

import pytest
import torch

from adatsq_trt.calibration.finite import require_finite_weight, require_range
from adatsq_trt.errors import UnsupportedFormatError
from adatsq_trt.formats import FORMATS
from adatsq_trt.quantizers import quantize_nearest

LAYERS = ("to_q", "ff")


def test_inputs_that_float16_cannot_hold_name_layer_step_and_format() -> None:
    largest = torch.tensor([[1.0, 65504.0], [2.0, 70000.0]])
    require_range([FORMATS[name] for name in ("bf16", "fp8", "fp32", "w4a4")], LAYERS, largest)
    require_range([FORMATS["fp16"]], LAYERS, largest[:1])
    with pytest.raises(UnsupportedFormatError, match=r"'ff': its inputs reach 7e\+04 at step 1, .* 'fp16' .* 65504"):
        require_range([FORMATS["fp8"], FORMATS["fp16"]], LAYERS, largest)


def test_weights_that_float16_cannot_hold_name_layer_and_format() -> None:
    weight = torch.tensor([[1.0, 65504.0], [1.0, 70000.0]])
    for name, values in (("bf16", weight), ("fp8", weight), ("fp16", weight[:1])):
        require_finite_weight("ff", FORMATS[name], quantize_nearest(values, FORMATS[name]))
    with pytest.raises(UnsupportedFormatError, match="layer 'ff': format 'fp16' cannot hold its weights: its largest"):
        require_finite_weight("ff", FORMATS["fp16"], quantize_nearest(weight, FORMATS["fp16"]))

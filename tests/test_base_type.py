"""One type for everything that is not quantized, whatever the targets."""

import pytest

from adatsq_trt.base_type import base_type, require_one_type
from adatsq_trt.errors import UnsupportedFormatError
from adatsq_trt.formats import FORMAT_SETS, TARGETS, resolve_formats


@pytest.mark.parametrize(
    ("targets", "formats", "simulate", "expected"),
    [
        (("cpu",), "cpu", False, "float32"),
        (("sm120",), "blackwell", False, "bfloat16"),
        (("sm80", "sm86"), "ampere", False, "float16"),
        (("sm89", "sm80"), "int4wo,fp16", False, "float16"),  # shared by all
        (("sm120", "cpu"), "w8a8s", False, "bfloat16"),  # the processor runs the GPU's weights
        (("cpu",), "cpu", True, "bfloat16"),
        ((), "paper", True, "bfloat16"),
        ((), "w4a4,fp16", True, "float16"),
    ],
)
def test_the_type_that_all_targets_share(targets: tuple, formats: str, simulate: bool, expected: str) -> None:
    assert base_type(targets, [fmt.name for fmt in resolve_formats(formats)], simulate) == expected


def test_two_16_bit_types_are_refused() -> None:
    for formats in FORMAT_SETS.values():
        require_one_type(formats)
    assert all(
        {"bf16", "fp16"} <= target.formats for target in TARGETS.values() if target.formats and target.name != "cpu"
    )
    with pytest.raises(UnsupportedFormatError, match="both bf16 and fp16"):
        require_one_type(("bf16", "fp8", "fp16"))

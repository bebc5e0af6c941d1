"""The kernels in Triton's interpreter, beside the operations that they stand for."""

import pytest
import torch

from adatsq_trt.formats import format_named
from adatsq_trt.models.gpu_kernels import WIDEST, round_tokens, scale_codes
from adatsq_trt.quantizers import dequantize_weight, fake_quantize_activation, quantize_nearest


@pytest.mark.parametrize("name", ["w3a3", "w4a4", "w8a8"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 100), (1, 1), (2, 1025)])
def test_it_rounds_as_the_operations_do(name: str, shape: tuple[int, ...]) -> None:
    x, grid = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3, format_named(name).activation
    x[0] = 0  # a token of zeros stays finite
    for given in (x, x.bfloat16()):
        expected = fake_quantize_activation(given, grid)
        assert torch.equal(round_tokens(given, grid.maximum, torch.float32), expected)
        # The interpreter cuts off what bfloat16 has no room for, where a GPU rounds.
        torch.testing.assert_close(
            round_tokens(given, grid.maximum, torch.bfloat16), expected.bfloat16(), rtol=2**-7, atol=0
        )


def test_tokens_need_not_lie_one_after_the_other() -> None:
    x, grid = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).T, format_named("w4a4").activation
    assert torch.equal(round_tokens(x, grid.maximum, torch.float32), fake_quantize_activation(x, grid))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows_in_its_whole_token(bad: float) -> None:
    x, grid = torch.ones(2, 20), format_named("w8a8").activation
    x[1, 7] = bad
    for rounded in (round_tokens(x, grid.maximum, torch.float32), fake_quantize_activation(x, grid)):
        assert torch.equal(rounded[0], x[0])
        assert rounded[1].isnan().all()


def test_the_widest_token() -> None:
    x, grid = torch.randn(1, WIDEST, generator=torch.Generator().manual_seed(0)), format_named("w8a8").activation
    assert torch.equal(round_tokens(x, grid.maximum, torch.float32), fake_quantize_activation(x, grid))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 3072, 12288, 15360])
def test_on_a_gpu_too(width: int) -> None:
    x, grid = torch.randn(70, width, device="cuda"), format_named("w4a4").activation
    rounded, expected = round_tokens(x, grid.maximum, torch.float32).cpu(), fake_quantize_activation(x.cpu(), grid)
    # Where a quotient lies between two points its last bit decides.
    assert float((rounded != expected).float().mean()) < 1e-4


@pytest.mark.parametrize("name", ["w4a4", "w8a8"])  # groups of 64, and one scale for an output
@pytest.mark.parametrize("shape", [(3, 64), (2, 192), (2, 4160)])
def test_weights_are_dequantized_as_by_the_operation(name: str, shape: tuple[int, int]) -> None:
    fmt = format_named(name)
    stored = quantize_nearest(torch.randn(shape, generator=torch.Generator().manual_seed(0)), fmt)
    assert stored.scales is not None
    expected = dequantize_weight(stored, fmt)
    assert torch.equal(scale_codes(stored.codes, stored.scales, torch.float32), expected)
    found = scale_codes(stored.codes, stored.scales, torch.bfloat16)
    torch.testing.assert_close(found, dequantize_weight(stored, fmt, torch.bfloat16), rtol=2**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_a_gpu_too(dtype: torch.dtype) -> None:
    fmt = format_named("w4a4")
    stored = quantize_nearest(torch.randn(96, 12288), fmt)
    assert stored.scales is not None
    found = scale_codes(stored.codes.cuda(), stored.scales.cuda(), dtype).cpu()
    assert torch.equal(found, dequantize_weight(stored, fmt, dtype))

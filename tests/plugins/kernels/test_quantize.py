"""Activation quantizers in the interpreter: every bit as PyTorch has it, since all their operations are IEEE's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.formats import FORMATS
from adatsq_trt.plugins.kernels import cases
from adatsq_trt.plugins.kernels.quantize import even_odd, quantize_fp8_reference, quantize_tokens_reference
from adatsq_trt.quantizers import fake_quantize_activation

DTYPES = (torch.float16, torch.bfloat16)


def random_x(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(m, k, generator=generator) * torch.logspace(-3, 3, m)[:, None]).to(dtype)


@settings(max_examples=25)
@given(
    m=st.integers(1, 5),
    k=st.one_of(st.integers(1, 80), st.integers(1000, 2100)),
    dtype=st.sampled_from(DTYPES),
    smooth=st.booleans(),
    maximum=st.sampled_from((127.0, 7.0)),
    in_even_odd=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tokens(m: int, k: int, dtype: torch.dtype, smooth: bool, maximum: float, in_even_odd: bool, seed: int) -> None:
    k += k % 2 if in_even_odd else 0
    x = random_x(m, k, dtype, seed)
    divisor = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.5 if smooth else None
    codes, scale = cases.quantize_tokens(x, divisor, maximum, in_even_odd)
    expected, expected_scale = quantize_tokens_reference(x, divisor, maximum)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, even_odd(expected) if in_even_odd else expected)
    assert codes.abs().max() == maximum


@pytest.mark.parametrize(("name", "maximum"), [("w8a8", 127.0), ("w4a4", 7.0)])
def test_tokens_are_quantized_as_the_method_simulates_it(name: str, maximum: float) -> None:
    x = random_x(7, 64, torch.float16, 0)
    codes, scale = cases.quantize_tokens(x, None, maximum, False)
    assert torch.equal(codes * scale[:, None], fake_quantize_activation(x.float(), FORMATS[name].activation))


def test_a_token_of_zeros_stays_zero_and_finite() -> None:
    codes, scale = cases.quantize_tokens(torch.zeros(1, 40, dtype=torch.float16), None, 127.0, False)
    assert not codes.any()
    assert 0 < float(scale) < 1e-11


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_token_that_is_not_finite_does_not_pass_for_one_that_is(value: float, smooth: bool) -> None:
    x = torch.ones(3, 1500, dtype=torch.bfloat16)
    x[1, 1400] = value
    with np.errstate(invalid="ignore"):  # its codes are of no account
        codes, scale = cases.quantize_tokens(x, torch.ones(1500) if smooth else None, 127.0, False)
    assert scale.isnan().tolist() == [False, True, False]
    assert (codes[[0, 2]] == 127).all()


def test_fp8_keeps_nan_and_saturates_infinities() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], dtype=torch.float16)
    codes = cases.quantize_fp8(x, torch.ones(1)).float()
    assert codes[0, 0].isnan()
    assert codes[0, 1:].tolist() == [448.0, -448.0, 1.0]


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], dtype=torch.float16)
    codes, _ = cases.quantize_tokens(x, None, 127.0, False)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 80), st.sampled_from(DTYPES), st.integers(0, 99))
def test_fp8(m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x, scale = random_x(m, k, dtype, seed), torch.tensor([0.37])
    codes = cases.quantize_fp8(x, scale)
    assert torch.equal(codes.view(torch.uint8), quantize_fp8_reference(x, scale).view(torch.uint8))

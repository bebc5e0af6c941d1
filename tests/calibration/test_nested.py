"""One copy for two widths: what the planes hold, and that solving them together is worth it."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.nested import (
    LIMIT,
    NARROW,
    WIDE,
    NestedWeight,
    _Cost,
    nest,
    solve_jointly,
    split_rounded,
    weighted_error,
)
from adatsq_trt.packing import join_planes, split_planes
from adatsq_trt.quantizers import QuantizedWeight, round_scale

ROWS, INPUTS = 16, 128


def problem(decay: float) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian with eigenvalues i^-decay."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator))[0]
    eigenvalues = torch.arange(1, INPUTS + 1) ** -decay
    return torch.randn(ROWS, INPUTS, generator=generator), (directions * eigenvalues) @ directions.T


def losses(weight: Tensor, hessian: Tensor, nested: NestedWeight) -> tuple[float, float]:
    """Errors of both widths, relative to copies of their own."""
    own = gptq(weight, hessian, NARROW), gptq(weight, hessian, WIDE)
    both = (nested.narrow, own[0], NARROW), (nested.wide, own[1], WIDE)
    first, second = (weighted_error(weight, n, f, hessian) / weighted_error(weight, o, f, hessian) for n, o, f in both)
    return first, second


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("way", [split_rounded, solve_jointly])
def test_planes_and_scales_are_what_the_kernels_read(way, group: int | None) -> None:
    weight, hessian = problem(1.0)
    weight[3] = 0.0  # a row without a scale of its own
    hessian[:, 5] = hessian[5] = 0.0  # an input that is always zero
    arguments = (weight, hessian, (1.0, 0.01), group) if way is solve_jointly else (weight, hessian, group)
    nested = way(*arguments)
    assert nested.high.dtype == nested.low.dtype == torch.int8
    assert (nested.high.min() >= -7, nested.high.max() <= 7) == (True, True)
    assert (nested.low.min() >= -8, nested.low.max() <= 7) == (True, True)
    assert nested.narrow_scales.shape == (ROWS, INPUTS // 64)
    assert nested.wide_scales.shape == (ROWS, 1 if group is None else INPUTS // group)
    for scales in (nested.narrow_scales, nested.wide_scales):
        assert (scales > 0).all()
        torch.testing.assert_close(scales, round_scale(scales), rtol=0, atol=0)
    high, low = split_planes(nested.wide.codes)
    assert torch.equal(high, nested.narrow.codes)
    assert torch.equal(join_planes(high, low), nested.wide.codes)


def test_the_weighted_error_is_that_of_the_output() -> None:
    """With H the mean of x xᵀ, it is the mean squared error of W x, summed over channels."""
    weight, _ = problem(0.0)
    inputs = torch.randn(40, INPUTS, generator=torch.Generator().manual_seed(2))
    quantized = gptq(weight, inputs.T @ inputs / len(inputs), NARROW)
    delta = quantized.codes * quantized.scales.repeat_interleave(64, dim=1) - weight
    expected = float((inputs @ delta.T).square().sum(dim=1).mean())
    assert weighted_error(weight, quantized, NARROW, inputs.T @ inputs / len(inputs)) == pytest.approx(expected, 1e-5)


@given(st.floats(-9, 9), st.floats(-150, 150), st.floats(0.01, 100), st.floats(0.5, 2))
def test_the_best_codes_are_the_best_of_all(narrow: float, wide: float, balance: float, ratio: float) -> None:
    cost = _Cost(balance, 1.0, torch.full((1, 1), 16 * ratio), torch.ones(1, 1))
    high, low = cost.best(0, torch.tensor([16 * narrow]), torch.tensor([wide]))

    def value(h: float, lo: float) -> float:
        return balance * (16 * narrow - 16 * ratio * h) ** 2 + (wide - (16 * h + lo)) ** 2

    best = min(value(h, lo) for h, lo in product(range(-7, 8), range(-8, 8)))
    assert value(float(high), float(low)) == pytest.approx(best, rel=1e-4, abs=1e-3)


def copies(weight: Tensor, hessian: Tensor) -> tuple[QuantizedWeight, QuantizedWeight]:
    return gptq(weight, hessian, NARROW), gptq(weight, hessian, WIDE)


def test_solving_jointly_almost_halves_the_worse_loss() -> None:
    weight, hessian = problem(1.5)
    own = copies(weight, hessian)
    errors = weighted_error(weight, own[0], NARROW, hessian), weighted_error(weight, own[1], WIDE, hessian)
    jointly = max(losses(weight, hessian, solve_jointly(weight, hessian, errors)))
    assert jointly < 0.6 * max(losses(weight, hessian, split_rounded(weight, hessian)))


def test_a_layer_is_nested_only_within_the_limit() -> None:
    """Where inputs hardly correlate, GPTQ stays near the nearest codes, which planes can follow."""
    weight, hessian = problem(0.5)
    nested = nest(weight, hessian, *copies(weight, hessian))
    assert nested is not None
    assert 1 < max(losses(weight, hessian, nested)) <= LIMIT
    weight, hessian = problem(1.5)
    assert nest(weight, hessian, *copies(weight, hessian)) is None

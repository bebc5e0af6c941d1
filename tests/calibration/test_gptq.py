"""GPTQ against round-to-nearest, against a plain float64 solver, and on its grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.hessian import second_moment
from adatsq_trt.formats import FORMATS, Element, Format
from adatsq_trt.quantizers import (
    SEARCHED_SCALE_MAX,
    QuantizedWeight,
    dequantize_weight,
    encode_weight,
    group_width,
    plain_type,
    quantize_nearest,
    round_to_grid,
    search_scale,
    weight_global_scale,
)

# One format of each weight grid.
GRIDS = [FORMATS[name] for name in ("w3a3", "w4a4", "w5a5", "w6a6", "w8a8", "fp8", "nvfp4")]
PLAIN = [f for f in FORMATS.values() if f.weight.is_float]
per_grid = pytest.mark.parametrize("fmt", GRIDS, ids=lambda f: f.name)


def random_weight(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def correlated_hessian(width: int, seed: int) -> Tensor:
    """Second moment of inputs that mix a quarter as many causes with channels of unequal size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    causes, mix = torch.randn(400, width // 4, generator=generator), torch.randn(width // 4, width, generator=generator)
    sizes = torch.exp(0.5 * torch.randn(width, generator=generator))
    return second_moment((causes @ mix + 0.3 * torch.randn(400, width, generator=generator)) * sizes)


def loss(weight: Tensor, quantized: QuantizedWeight, fmt: Format, hessian: Tensor) -> float:
    error = (weight - dequantize_weight(quantized, fmt)).double()
    return float(((error @ hessian.double()) * error).sum())


def effective_scales(quantized: QuantizedWeight) -> Tensor:
    assert quantized.scales is not None
    factor = 1.0 if quantized.global_scale is None else quantized.global_scale
    return quantized.scales.float() * factor


def quantize_clipped(weight: Tensor, fmt: Format) -> QuantizedWeight:
    """Round to nearest with the scales that have the least squared error."""
    grid = fmt.weight
    width, global_scale = group_width(grid, weight.shape[1]), weight_global_scale(weight, grid, SEARCHED_SCALE_MAX)
    groups = weight.reshape(-1, width)
    scales = search_scale(groups, grid, global_scale)
    values = (round_to_grid(groups / scales, grid) * scales).reshape(weight.shape)
    return encode_weight(values, scales.reshape(len(weight), -1), grid, global_scale)


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    parts = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(torch.equal(x.float(), y.float()) for x, y in parts)


@per_grid
@settings(max_examples=8)
@given(rows=st.integers(8, 40), groups=st.integers(1, 3), seed=st.integers(0, 10_000), ordered=st.booleans())
def test_gptq_beats_round_to_nearest(fmt: Format, rows: int, groups: int, seed: int, ordered: bool) -> None:
    width = 64 * groups
    weight, hessian = random_weight(rows, width, seed), correlated_hessian(width, seed)
    solved = loss(weight, gptq(weight, hessian, fmt, activation_order=ordered), fmt, hessian)
    for nearest in (quantize_nearest(weight, fmt), quantize_clipped(weight, fmt)):
        assert solved < 0.9 * loss(weight, nearest, fmt, hessian)


@per_grid
@pytest.mark.parametrize("ordered", [True, False])
def test_an_identity_hessian_gives_round_to_nearest(fmt: Format, ordered: bool) -> None:
    weight = random_weight(24, 128, 0)
    assert same(gptq(weight, torch.eye(128), fmt, activation_order=ordered), quantize_clipped(weight, fmt))


@per_grid
def test_the_result_lies_on_the_formats_grid(fmt: Format) -> None:
    weight = random_weight(16, 128, 1)
    result, grid = gptq(weight, correlated_hessian(128, 1), fmt), fmt.weight
    scales = effective_scales(result)
    assert scales.shape == (16, 128 // group_width(grid, 128))
    again = encode_weight(dequantize_weight(result, fmt), scales, grid, result.global_scale)
    assert same(result, again)
    if grid.element is Element.INT:
        assert result.codes.dtype == torch.int8
        assert result.codes.abs().max() == grid.maximum
    elif grid.element is Element.E2M1:
        assert result.codes.max() < 16
        assert result.codes.long().bitwise_and(7).max() == 7
    else:
        assert result.codes.float().abs().max() <= grid.maximum


@per_grid
@pytest.mark.parametrize("ordered", [True, False])
def test_blocks_only_change_the_order_of_additions(fmt: Format, ordered: bool) -> None:
    weight, hessian = random_weight(16, 192, 2), correlated_hessian(192, 2)
    single = gptq(weight, hessian, fmt, block=1, activation_order=ordered)
    for block in (50, 192, 1000):
        blocked = gptq(weight, hessian, fmt, block=block, activation_order=ordered)
        assert torch.equal(effective_scales(single), effective_scales(blocked))
        # A rounding that falls the other way changes the rest of its row, so rows are either equal or few.
        equal = (single.codes.float() == blocked.codes.float()).all(dim=1)
        assert equal.float().mean() > 0.6
        assert loss(weight, blocked, fmt, hessian) == pytest.approx(loss(weight, single, fmt, hessian), rel=0.1)


def plain_solver(weight: Tensor, hessian: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Optimal brain quantization, left to right, by eliminating one column of the inverse at a time; float64."""
    weight, inverse = weight.double().clone(), hessian.double().inverse()
    for j in range(weight.shape[1]):
        rounded = round_to_grid((weight[:, j] / scales[:, j]).float(), fmt.weight) * scales[:, j]
        weight -= torch.outer((weight[:, j] - rounded) / inverse[j, j], inverse[j])
        weight[:, j] = rounded
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0.0
    return weight.float()


@per_grid
def test_the_solver_is_optimal_brain_quantization(fmt: Format) -> None:
    weight, hessian = random_weight(16, 64, 3), correlated_hessian(64, 3)
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    result = gptq(weight, hessian, fmt, damping=0.05, activation_order=False)
    wide = effective_scales(result).repeat_interleave(group_width(fmt.weight, 64), dim=1)
    expected = plain_solver(weight, damped, wide, fmt)
    equal = torch.isclose(dequantize_weight(result, fmt), expected, rtol=1e-5, atol=1e-7).all(dim=1)
    assert equal.float().mean() > 0.8


@per_grid
def test_scales_are_chosen_by_the_hessians_diagonal(fmt: Format) -> None:
    weight, hessian = random_weight(8, 128, 4), correlated_hessian(128, 4)
    width, importance = group_width(fmt.weight, 128), hessian.diagonal() + 0.01 * hessian.diagonal().mean()
    second = weight_global_scale(weight, fmt.weight, SEARCHED_SCALE_MAX)
    expected = search_scale(weight[:, -width:], fmt.weight, second, importance[-width:])
    assert torch.equal(effective_scales(gptq(weight, hessian, fmt))[:, -1:], expected)


def test_only_the_hessians_shape_counts_not_its_size() -> None:
    weight, hessian = random_weight(16, 64, 5), correlated_hessian(64, 5)
    for factor in (2.0**-20, 2.0**10):
        assert same(gptq(weight, factor * hessian, FORMATS["w4a4"]), gptq(weight, hessian, FORMATS["w4a4"]))


@per_grid
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**-10, 2.0**10])
def test_nor_does_its_size_count_beside_dead_inputs(fmt: Format, factor: float) -> None:
    weight, hessian = random_weight(16, 128, 5), correlated_hessian(128, 5)
    dead = torch.tensor([0, 7, 30, 63])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    assert same(gptq(weight, factor * hessian, fmt), gptq(weight, hessian, fmt))


def test_damping_is_a_part_of_the_live_inputs_mean() -> None:
    """So the columns of live inputs are rounded as they would be without the dead ones."""
    weight, hessian, fmt = random_weight(16, 128, 11), correlated_hessian(128, 11), FORMATS["nvfp4"]
    hessian[64:], hessian[:, 64:] = 0.0, 0.0
    weight[:, 64:] = 0.0
    alone = gptq(weight[:, :64], hessian[:64, :64], fmt)
    equal = torch.isclose(
        dequantize_weight(gptq(weight, hessian, fmt), fmt)[:, :64], dequantize_weight(alone, fmt), rtol=1e-5, atol=1e-7
    ).all(dim=1)
    assert equal.float().mean() > 0.8


@per_grid
@pytest.mark.parametrize("ordered", [True, False])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing(fmt: Format, ordered: bool) -> None:
    weight, hessian = random_weight(16, 64, 6), correlated_hessian(64, 6)
    dead = torch.tensor([0, 7, 30, 63])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    result = gptq(weight, hessian, fmt, activation_order=ordered)
    values = dequantize_weight(result, fmt)
    assert values.isfinite().all()
    wide = effective_scales(result).repeat_interleave(group_width(fmt.weight, 64), dim=1)[:, dead]
    assert torch.equal(values[:, dead], round_to_grid(weight[:, dead] / wide, fmt.weight) * wide)
    assert loss(weight, result, fmt, hessian) < loss(weight, quantize_nearest(weight, fmt), fmt, hessian)


def test_a_layer_that_never_saw_input_is_rounded_to_nearest() -> None:
    weight = random_weight(8, 64, 7)
    fmt = FORMATS["w4a4"]
    assert same(gptq(weight, torch.zeros(64, 64), fmt), quantize_clipped(weight, fmt))


def test_activation_order_visits_the_largest_diagonal_first() -> None:
    weight, hessian, fmt = random_weight(32, 64, 8), correlated_hessian(64, 8), FORMATS["w3a3"]
    order = hessian.diagonal().argsort(descending=True)
    # A group of all columns makes the scales independent of where columns lie.
    sorted_by_hand = gptq(weight[:, order], hessian[order][:, order], fmt, activation_order=False)
    ordered = gptq(weight, hessian, fmt, activation_order=True)
    equal = (ordered.codes[:, order] == sorted_by_hand.codes).all(dim=1)
    assert equal.float().mean() > 0.9
    assert not torch.equal(ordered.codes, gptq(weight, hessian, fmt, activation_order=False).codes)


@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_plain_formats_are_rounded_to_nearest(fmt: Format) -> None:
    weight = random_weight(8, 48, 9)
    result = gptq(weight, correlated_hessian(48, 9), fmt)
    assert result.scales is None
    assert torch.equal(result.codes, weight.to(plain_type(fmt.weight)))


def test_the_arguments_are_left_alone() -> None:
    weight, hessian = random_weight(8, 64, 10), correlated_hessian(64, 10)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, FORMATS["w4a4"], activation_order=False)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])

"""Grids against ml_dtypes, bit for bit, and the properties of scales and codes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from adatsq_trt.formats import FORMATS, Element, Format, Granularity, Grid
from adatsq_trt.quantizers import (
    MIN_SCALE,
    SEARCHED_SCALE_MAX,
    QuantizedWeight,
    decode_e2m1,
    dequantize_weight,
    eight_bits,
    encode_e2m1,
    encode_weight,
    fake_quantize_activation,
    finish_scale,
    quantize_nearest,
    round_e2m1,
    round_e4m3,
    round_scale,
    round_to_grid,
    search_scale,
    static_activation_scale,
    weight_global_scale,
)

QUANTIZED = [f for f in FORMATS.values() if not f.weight.is_float]
PLAIN = [f for f in FORMATS.values() if f.weight.is_float]


def grid_points(dtype: type) -> np.ndarray:
    """All finite numbers of a small floating type, ascending, float32."""
    codes = np.arange(16 if dtype is ml_dtypes.float4_e2m1fn else 256, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def probes(dtype: type) -> np.ndarray:
    """Every number of the grid, every midpoint, the floats next to both, and a hundred thousand random numbers."""
    points = grid_points(dtype)
    exact = np.concatenate([points, (points[1:] + points[:-1]) / 2, np.float32([-0.0])])
    near = np.concatenate([np.nextafter(exact, np.float32(s * np.inf), dtype=np.float32) for s in (-1, 1)])
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.uniform(-12, np.log2(points[-1]), 100_000))
    random = (rng.uniform(-1, 1, 100_000) * scales).astype(np.float32)
    everything = np.concatenate([exact, near, random])
    return everything[np.abs(everything) <= points[-1]]


def bits(values: np.ndarray) -> np.ndarray:
    """float32 bit patterns: tells -0.0 from 0.0."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("rounding", "dtype"), [(round_e4m3, ml_dtypes.float8_e4m3fn), (round_e2m1, ml_dtypes.float4_e2m1fn)]
)
def test_floating_grids_agree_with_ml_dtypes_bit_for_bit(rounding, dtype: type) -> None:
    values = probes(dtype)
    expected = values.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(bits(rounding(torch.from_numpy(values)).numpy()), bits(expected))


@pytest.mark.parametrize(("rounding", "largest"), [(round_e4m3, 448.0), (round_e2m1, 6.0)])
def test_floating_grids_saturate(rounding, largest: float) -> None:
    beyond = torch.tensor([largest * 1.001, largest * 100, torch.inf])
    assert rounding(torch.cat([beyond, -beyond])).tolist() == [largest] * 3 + [-largest] * 3


def test_e2m1_codes_are_those_of_ml_dtypes() -> None:
    codes = np.arange(16, dtype=np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(encode_e2m1(torch.from_numpy(values)).numpy(), codes)
    np.testing.assert_array_equal(bits(decode_e2m1(torch.from_numpy(codes)).numpy()), bits(values))


@given(st.floats(2.0**-20, 60000, width=32))
def test_scales_are_the_same_number_in_every_16_bit_type(value: float) -> None:
    scale = round_scale(torch.tensor(value))
    assert scale == scale.bfloat16().float() == scale.half().float()
    assert scale >= MIN_SCALE
    assert abs(scale - value) <= max(value / 256, MIN_SCALE)


def weights(out_features: int = 3, in_features: int = 64) -> st.SearchStrategy[torch.Tensor]:
    """[3, 64] weights: any float32 in [-4, 4], with runs of zeros and repeated values."""
    elements = st.floats(-4, 4, width=32)
    return npst.arrays(np.float32, (out_features, in_features), elements=elements).map(torch.from_numpy)


def effective_scales(weight: QuantizedWeight) -> torch.Tensor:
    """float32 [N, K / group], the second level multiplied in."""
    assert weight.scales is not None
    return weight.scales.float() * (1 if weight.global_scale is None else weight.global_scale)


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
@given(values=weights())
def test_round_to_nearest_stays_within_half_a_spacing(fmt: Format, values: torch.Tensor) -> None:
    quantized = quantize_nearest(values, fmt)
    scales = effective_scales(quantized)
    scale = scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
    error = (dequantize_weight(quantized, fmt) - values).abs()
    # Integers are 1 apart, e2m1 at most 2; e4m3 keeps four significant bits. Stored scales are rounded, so the largest
    # weight may lie a little outside the grid: half a bfloat16 step of it, half an e4m3 step for block scales.
    clipped = values.abs() * (1 / 16 if fmt.weight.element is Element.E2M1 else 1 / 256)
    half = {Element.INT: 0.5 * scale, Element.E2M1: scale, Element.E4M3: values.abs() / 16 + scale * 2.0**-10}
    assert (error <= half[fmt.weight.element] + clipped + 1e-7).all()


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
@given(values=weights())
def test_what_is_on_the_grid_stays(fmt: Format, values: torch.Tensor) -> None:
    """Codes survive dequantizing and encoding with the same scales."""
    quantized = quantize_nearest(values, fmt)
    again = encode_weight(
        dequantize_weight(quantized, fmt), effective_scales(quantized), fmt.weight, quantized.global_scale
    )
    for name, part in quantized.tensors().items():
        assert torch.equal(again.tensors()[name].float(), part.float()), name


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_storage_types_and_shapes(fmt: Format) -> None:
    quantized = quantize_nearest(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), fmt)
    grid = fmt.weight
    codes = {Element.INT: torch.int8, Element.E4M3: torch.float8_e4m3fn, Element.E2M1: torch.uint8}
    groups = 128 // grid.group_size if grid.granularity is Granularity.GROUP else 1
    assert quantized.codes.dtype is codes[grid.element]
    assert quantized.codes.shape == (8, 128)
    assert quantized.scales is not None
    assert quantized.scales.shape == (8, groups)
    assert quantized.scales.dtype is (torch.float8_e4m3fn if grid.element is Element.E2M1 else torch.float32)
    assert (quantized.global_scale is not None) == (grid.element is Element.E2M1)
    if grid.element is Element.INT:
        assert quantized.codes.abs().max() == grid.maximum


@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_plain_formats_are_casts(fmt: Format) -> None:
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[fmt.name]
    quantized = quantize_nearest(values, fmt)
    assert quantized.codes.dtype is dtype
    assert torch.equal(dequantize_weight(quantized, fmt), values.to(dtype).float())
    assert torch.equal(fake_quantize_activation(values, fmt.activation), values.to(dtype).float())


@pytest.mark.parametrize("fmt", [*QUANTIZED, *PLAIN], ids=lambda f: f.name)
def test_zero_weights_stay_zero(fmt: Format) -> None:
    assert torch.equal(dequantize_weight(quantize_nearest(torch.zeros(4, 64), fmt), fmt), torch.zeros(4, 64))


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_searched_scales_of_zero_weights_are_finite(fmt: Format) -> None:
    values = torch.zeros(4, 64)
    scales = search_scale(values, fmt.weight, weight_global_scale(values, fmt.weight))
    assert (scales.isfinite() & (scales > 0)).all()


@pytest.mark.parametrize("name", ["nvfp4", "w3a3", "w4a4", "w8a8", "fp8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_never_worse_than_the_largest_magnitude(name: str, weighted: bool) -> None:
    grid, generator = FORMATS[name].weight, torch.Generator().manual_seed(0)
    values = torch.randn(256, 16, generator=generator)
    importance = torch.rand(16, generator=generator) + 0.1 if weighted else torch.ones(16)
    second = weight_global_scale(values, grid)

    def error(scale: torch.Tensor) -> torch.Tensor:
        points = (values / scale).clamp(-grid.maximum, grid.maximum)
        rounded = points.round() if grid.element is Element.INT else points
        rounded = round_e4m3(points) if grid.element is Element.E4M3 else rounded
        rounded = round_e2m1(points) if grid.element is Element.E2M1 else rounded
        return ((rounded * scale - values).square() * importance).sum(dim=1)

    plain = finish_scale(values.abs().amax(dim=1, keepdim=True) / grid.maximum, grid, second)
    searched = error(search_scale(values, grid, second, importance if weighted else None))
    assert (searched <= error(plain) + 1e-9).all()
    if grid.bits <= 4:
        assert searched.sum() < 0.95 * error(plain).sum()


def e2m1_blocks(blocks: np.ndarray, ratio: float, second: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, block scales and numbers of blocks [blocks, 16] with the largest magnitude at 6 / ratio, by ml_dtypes."""
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    stored = np.clip(largest * np.float32(ratio) / np.float32(6) / second, 2.0**-9, 448)
    scales = stored.astype(ml_dtypes.float8_e4m3fn)
    effective = scales.astype(np.float32) * second
    points = np.clip(blocks / effective, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return points.view(np.uint8), scales, points.astype(np.float32) * effective


@pytest.mark.parametrize("weighted", [False, True])
def test_a_block_has_4_or_6_as_its_largest_point_whichever_errs_less_as_ml_dtypes_rounds(weighted: bool) -> None:
    grid, generator = FORMATS["nvfp4"].weight, torch.Generator().manual_seed(1)
    values = torch.randn(400, 16, generator=generator)
    importance = torch.rand(16, generator=generator) + 0.1 if weighted else torch.ones(16)
    second = weight_global_scale(values, grid, SEARCHED_SCALE_MAX)
    assert second is not None
    scales = search_scale(values, grid, second, importance)
    found = encode_weight(round_to_grid(values / scales, grid) * scales, scales, grid, second)

    # 3 / 2 of the scale has 4 as the largest point, parts of it below 1 clip.
    ratios = [i / 20 for i in range(30, 9, -1)]
    tried = [e2m1_blocks(values.numpy(), ratio, second.numpy()) for ratio in ratios]
    errors = np.stack([((value - values.numpy()) ** 2 * importance.numpy()).sum(axis=1) for *_, value in tried])
    best, rows = errors.argmin(axis=0), np.arange(len(values))
    stored = np.stack([scale.view(np.uint8)[:, 0] for _, scale, _ in tried])
    # Of scales that err alike to float32's rounding either may be chosen.
    told_apart = ((errors > errors.min(axis=0) * (1 + 1e-5)) | (stored == stored[best, rows])).all(axis=0)
    codes = np.stack([codes for codes, *_ in tried])[best, rows]
    assert found.scales is not None
    np.testing.assert_array_equal(found.codes.numpy()[told_apart], codes[told_apart])
    own = found.scales.view(torch.uint8).numpy()[:, 0]
    np.testing.assert_array_equal(own[told_apart], stored[best, rows][told_apart])
    assert 0.1 < (np.array(ratios)[best] > 1.25).mean() < 0.9, "some blocks gain by it, and some do not"
    assert told_apart.mean() > 0.9


def test_the_block_with_the_largest_magnitude_may_have_4_as_its_largest_point() -> None:
    """5 / 6 of it would be rounded by a sixth with 6 as the largest point."""
    grid, values = FORMATS["nvfp4"].weight, torch.tensor([[4.0, 3.0, 2.0, 1.5, 1.0, 0.5, *[0.0] * 10]])
    second = weight_global_scale(values, grid, SEARCHED_SCALE_MAX)
    scales = search_scale(values, grid, second)
    found = encode_weight(round_to_grid(values / scales, grid) * scales, scales, grid, second)
    assert found.codes.bitwise_and(7).max() == 6, "the code of 4"
    torch.testing.assert_close(dequantize_weight(found, FORMATS["nvfp4"]), values, rtol=2**-20, atol=0)
    largest_is_6 = dequantize_weight(quantize_nearest(values, FORMATS["nvfp4"]), FORMATS["nvfp4"])
    assert (largest_is_6 - values).abs().max() > 0.3


# ------------------------------------------------------------------------------------------------ activations


def activations() -> st.SearchStrategy[torch.Tensor]:
    """[3, 2, 32] activations."""
    return npst.arrays(np.float32, (3, 2, 32), elements=st.floats(-100, 100, width=32)).map(torch.from_numpy)


@given(x=activations(), width=st.sampled_from([3, 4, 5, 6, 8]))
def test_dynamic_activations_depend_on_their_own_token_only(x: torch.Tensor, width: int) -> None:
    grid = Grid(Element.INT, width, Granularity.TOKEN)
    whole = fake_quantize_activation(x, grid)
    assert torch.equal(whole[1, 1], fake_quantize_activation(x[1, 1], grid))
    step = x.abs().amax(dim=-1, keepdim=True) / grid.maximum
    assert ((whole - x).abs() <= 0.501 * step + 1e-6).all()
    assert whole.isfinite().all()


def test_a_group_has_a_scale_of_16_bits_and_a_ratio_clips_it() -> None:
    """By hand: 3 bits reach from -3 to 3; the first group's step is 6 / 3, the second's 0.75 / 3."""
    grid = Grid(Element.INT, 3, Granularity.GROUP, 16, 16)
    x = torch.zeros(2, 32)
    x[0, :4] = torch.tensor([6.0, -2.9, 1.1, 0.9])
    x[0, 16:20] = torch.tensor([0.75, 0.4, -0.37, 0.1])
    whole = fake_quantize_activation(x, grid)
    assert whole[0, :4].tolist() == [6.0, -2.0, 2.0, 0.0]
    assert whole[0, 16:20].tolist() == [0.75, 0.5, -0.25, 0.0]
    assert not whole[1].any()
    half = fake_quantize_activation(x, grid, torch.tensor(0.5))
    assert half[0, :4].tolist() == [3.0, -3.0, 1.0, 1.0]
    assert half[0, 16:20].tolist() == [0.375, 0.375, -0.375, 0.125]
    step = torch.tensor(1.0 / 3).bfloat16().float()
    assert fake_quantize_activation(torch.full((1, 16), 1.0), grid)[0, 0] == 3 * step  # not 1: the scale was rounded


def test_steps_of_groups_have_eight_significant_bits() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-20, 20).repeat(2500)
    found = eight_bits(values)
    assert torch.equal(found, found.bfloat16().float())
    assert torch.equal((found - values).abs(), (values.bfloat16().float() - values).abs())  # ties may go either way


@given(x=activations(), width=st.sampled_from([3, 4, 6]))
def test_a_ratio_of_one_changes_nothing(x: torch.Tensor, width: int) -> None:
    grid = Grid(Element.INT, width, Granularity.TOKEN)
    assert torch.equal(fake_quantize_activation(x, grid, torch.tensor(1.0)), fake_quantize_activation(x, grid))


def test_a_group_as_wide_as_the_token_is_the_token_but_for_the_scale_s_bits() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    token = fake_quantize_activation(x, Grid(Element.INT, 4, Granularity.TOKEN))
    group = fake_quantize_activation(x, Grid(Element.INT, 4, Granularity.GROUP, 64, 16))
    step = x.abs().amax(dim=-1, keepdim=True) / 7
    assert ((group - token).abs() <= 1.03 * step).all()
    assert ((group - token).abs() <= 0.03 * step).float().mean() > 0.95


@pytest.mark.parametrize("name", ["fp8", "w8a8s"])
def test_static_activations_clip_at_the_calibrated_maximum(name: str) -> None:
    grid = FORMATS[name].activation
    scale = static_activation_scale(torch.tensor(2.0), grid)
    x = torch.tensor([-50.0, -2.0, 0.0, 1e-9, 2.0, 50.0])
    result = fake_quantize_activation(x, grid, scale)
    limit = grid.maximum * scale
    assert result.tolist() == [-limit, result[1], 0.0, 0.0, -result[1], limit]
    assert abs(float(limit) - 2) < 2 / 128


@given(x=activations())
def test_nvfp4_activations_agree_with_ml_dtypes_bit_for_bit(x: torch.Tensor) -> None:
    grid, scale = FORMATS["nvfp4"].activation, torch.tensor(100 / (6 * 448))
    blocks = x.numpy().reshape(-1, 16)
    raw = np.abs(blocks).max(axis=1, keepdims=True) / (np.float32(6) * scale.numpy())
    stored = np.minimum(raw, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.numpy()
    divisor = np.where(stored > 0, stored, np.float32(1))
    points = np.clip(blocks / divisor, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    result = fake_quantize_activation(x, grid, scale).numpy().reshape(-1, 16)
    np.testing.assert_array_equal(result, points * stored)


def test_nvfp4_scale_covers_the_largest_activation() -> None:
    grid = FORMATS["nvfp4"].activation
    x = torch.linspace(-3, 3, 64).reshape(1, 64)
    scale = static_activation_scale(x.abs().max(), grid)
    # e2m1 has steps of 2 at the top: a sixth of the block's largest magnitude is half a step.
    error = (fake_quantize_activation(x, grid, scale) - x).abs().reshape(-1, 16)
    assert (error.amax(dim=1) <= x.abs().reshape(-1, 16).amax(dim=1) * 0.23).all()

"""Scales, quantize, dequantize and fake-quantize: pure tensor functions.

Linear weights are [N, K] (out_features, in_features), activations [..., K]. Scales of weights and static scales of
activations are rounded to eight significant bits, so that bfloat16, float16 and float32 graphs hold the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.formats import Element, Format, Granularity, Grid

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1_MAX = 6.0
# Largest block scale of an e2m1 weight whose scales are searched: half as much again is a number of e4m3 too, so that
# every block may have 4 as its largest point (Cook et al. 2025, "Four Over Six", arXiv 2512.02010).
SEARCHED_SCALE_MAX = 256.0
# Smallest scale: normal in float16, so that every 16-bit graph holds it exactly.
MIN_SCALE = 2.0**-14
# Smallest step of integers with dynamic scales.
SMALLEST_STEP = 1e-12
# 2^16 + 1 splits float32's 24 significant bits into 8 and 16.
SPLITTER = 65537.0
_PLAIN_TYPES = {Element.FP32: torch.float32, Element.BF16: torch.bfloat16, Element.FP16: torch.float16}


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight on a format's grid.

    Attributes:
        codes: [N, K]. Plain floating formats: the values in that type. Integers: int8. E4M3: float8_e4m3fn.
            E2M1: uint8, sign in bit 3, magnitude code in bits 0 to 2 (not packed).
        scales: None for plain formats; float32 [N, K / group] (per channel: [N, 1]); for E2M1 the block scales,
            float8_e4m3fn [N, K / 16].
        global_scale: E2M1 only: float32 [], multiplies the block scales.
    """

    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, by attribute name: what a file stores."""
        parts = {"codes": self.codes, "scales": self.scales, "global_scale": self.global_scale}
        return {name: value for name, value in parts.items() if value is not None}


def plain_type(grid: Grid) -> torch.dtype:
    """The torch type of a plain floating grid."""
    return _PLAIN_TYPES[grid.element]


def round_scale(scale: Tensor) -> Tensor:
    """Round positive scales to eight significant bits, at least 2^-14; float32 in, float32 out."""
    return scale.bfloat16().float().clamp(min=MIN_SCALE)


def round_e4m3(values: Tensor) -> Tensor:
    """Nearest e4m3 number (ties to even, saturating at 448); float32 in, float32 out, any shape."""
    return _round_mantissa(values.clamp(-E4M3_MAX, E4M3_MAX), mantissa_bits=3, smallest_exponent=-6)


def round_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 number in {0, .5, 1, 1.5, 2, 3, 4, 6} (ties to even, saturating at 6); float32 in and out."""
    return _round_mantissa(values.clamp(-E2M1_MAX, E2M1_MAX), mantissa_bits=1, smallest_exponent=0)


def _round_mantissa(values: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Round float32 numbers to fewer mantissa bits, ties to even, subnormals included.

    Adding 1.5 * 2^(23 - mantissa_bits) times the number's own power of two pushes the bits that have to go out of
    float32's mantissa, so the addition rounds; subtracting it again leaves the rounded number. Faster here than going
    through the 8-bit type, and in place: fresh memory takes longer than the arithmetic.
    """
    exponent = (values.view(torch.int32) & 0x7F800000).clamp_(min=(127 + smallest_exponent) << 23)
    magic = exponent.add_((23 - mantissa_bits) << 23).view(torch.float32).mul_(1.5)
    return (values + magic).sub_(magic).copysign_(values)


_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e2m1(values: Tensor) -> Tensor:
    """Numbers on the e2m1 grid → uint8 codes."""
    table = torch.tensor(_E2M1_VALUES).to(values.device)
    return (torch.searchsorted(table, values.abs().contiguous()) + 8 * values.signbit()).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes → float32 numbers."""
    table = torch.tensor([*_E2M1_VALUES, *(-v for v in _E2M1_VALUES)]).to(codes.device)
    return table[codes.long()]


def round_to_grid(scaled: Tensor, grid: Grid, *, in_place: bool = False) -> Tensor:
    """Nearest point of a scaled grid (integers, e4m3, e2m1), saturating; float32 in, float32 out, any shape.

    With `in_place` the argument may be used up.
    """
    if grid.element is Element.INT:
        return (scaled.round_() if in_place else scaled.round()).clamp_(-grid.maximum, grid.maximum)
    return {Element.E4M3: round_e4m3, Element.E2M1: round_e2m1}[grid.element](scaled)


# ---------------------------------------------------------------------------------------------------- weights


def group_width(grid: Grid, in_features: int) -> int:
    """How many inputs share a scale of a weight, or of one token."""
    if grid.granularity is not Granularity.GROUP:
        return in_features
    group = grid.group_of(in_features)
    assert group is not None, "such layers were refused"
    return group


def weight_global_scale(weight: Tensor, grid: Grid, largest: float = E4M3_MAX) -> Tensor | None:
    """E2M1's second-level scale amax / (6 * largest), float32 []; None for other grids.

    Args:
        weight: [N, K] float32.
        grid: of its format.
        largest: block scale of the block that has the largest magnitude, if 6 is its largest point.
    """
    if grid.element is not Element.E2M1:
        return None
    return (weight.abs().amax() / (E2M1_MAX * largest)).clamp(min=2.0**-126)


def finish_scale(scale: Tensor, grid: Grid, global_scale: Tensor | None) -> Tensor:
    """Round a real-valued scale to what the format stores; returns the effective float32 scale.

    E2M1 stores e4m3 multiples of the global scale, everything else eight significant bits.
    """
    if global_scale is None:
        return round_scale(scale)
    return round_e4m3(scale / global_scale).clamp(min=2.0**-9) * global_scale


@torch.no_grad()
def search_scale(values: Tensor, grid: Grid, global_scale: Tensor | None, importance: Tensor | None = None) -> Tensor:
    """Scale of each row that minimizes sum(importance * (x - Q(x))²), among parts of that of the largest magnitude.

    Ratios are 1.0, 0.95 … 0.5, which clip, and for e2m1 from 1.5 on, where the largest magnitude lies at 4, below the
    gap between 4 and 6.

    Args:
        values: [N, G] float32: the weights that share a scale, one group per row.
        grid: integers, e4m3 or e2m1.
        global_scale: for e2m1.
        importance: [G] float32, typically the Hessian's diagonal; None for ones.

    Returns:
        [N, 1] float32 effective scales.
    """
    values = values.contiguous()
    scaled, largest = torch.empty_like(values), values.abs().amax(dim=1, keepdim=True)
    best_scale = finish_scale(largest / grid.maximum, grid, global_scale)
    best_error = torch.full_like(largest, torch.inf)
    for ratio in _ratios(grid):
        scale = finish_scale(largest * ratio / grid.maximum, grid, global_scale)
        torch.div(values, scale, out=scaled)  # in place: fresh memory takes longer than the arithmetic
        squares = round_to_grid(scaled, grid, in_place=True).mul_(scale).sub_(values).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(dim=1, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale


def _ratios(grid: Grid) -> list[float]:
    """Candidate scales of a group, as parts of that which puts the largest magnitude on the largest point."""
    if grid.element is Element.E4M3:
        return [1.0]  # a floating grid: clipping buys no resolution there
    largest = 30 if grid.element is Element.E2M1 else 20
    return [i / 20 for i in range(largest, 9, -1)]


@torch.no_grad()
def encode_weight(values: Tensor, scales: Tensor, grid: Grid, global_scale: Tensor | None) -> QuantizedWeight:
    """Pack grid points and scales in the format's storage types.

    Args:
        values: [N, K] float32, already dequantized grid points (scale * grid point).
        scales: [N, K / group] float32 effective scales.
        grid: integers, e4m3 or e2m1.
        global_scale: for e2m1.
    """
    wide = scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
    points = round_to_grid(torch.div(values, wide, out=wide), grid, in_place=True)
    if grid.element is Element.INT:
        return QuantizedWeight(points.to(torch.int8), scales)
    if grid.element is Element.E4M3:
        return QuantizedWeight(points.to(E4M3), scales)
    assert global_scale is not None
    return QuantizedWeight(encode_e2m1(points), (scales / global_scale).to(E4M3), global_scale)


def quantize_nearest(weight: Tensor, fmt: Format) -> QuantizedWeight:
    """Round to nearest, [N, K] float32 → grid; the baseline that GPTQ is measured against.

    Args:
        weight: [N, K] float32.
        fmt: any format; its scales are those of the largest magnitude.
    """
    grid = fmt.weight
    if grid.is_float:
        return QuantizedWeight(weight.to(plain_type(grid)))
    global_scale, width = weight_global_scale(weight, grid), group_width(grid, weight.shape[1])
    groups = weight.reshape(-1, width)
    scales = finish_scale(groups.abs().amax(dim=1, keepdim=True) / grid.maximum, grid, global_scale)
    values = (round_to_grid(groups / scales, grid) * scales).reshape(weight.shape)
    return encode_weight(values, scales.reshape(len(weight), -1), grid, global_scale)


def dequantize_weight(weight: QuantizedWeight, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes and scales → [N, K], computed in float32 and given in a floating type."""
    grid = fmt.weight
    if grid.is_float or weight.scales is None:
        return weight.codes.to(dtype)
    points = weight.codes
    if grid.element is not Element.INT:
        points = decode_e2m1(points) if grid.element is Element.E2M1 else points.float()
    scales = weight.scales.float() if weight.global_scale is None else weight.scales.float() * weight.global_scale
    values = torch.empty(points.shape, dtype=dtype, device=points.device).unflatten(1, (scales.shape[1], -1))
    # One pass over the weight: codes become float32, and products what they are wanted as, on the way.
    return torch.mul(points.view_as(values), scales[:, :, None], out=values).flatten(1)


# ------------------------------------------------------------------------------------------------ activations


def static_activation_scale(largest: Tensor, grid: Grid) -> Tensor:
    """Static scale from the largest magnitude; float32, shape of `largest`.

    Per-tensor grids: amax / grid maximum, eight significant bits. E2M1: the second-level scale amax / (6 * 448).
    """
    if grid.element is Element.E2M1:
        return round_scale_unbounded(largest / (E2M1_MAX * E4M3_MAX))
    return round_scale(largest / grid.maximum)


def round_scale_unbounded(scale: Tensor) -> Tensor:
    """Eight significant bits without the float16 floor: for scales that every graph keeps in float32."""
    return scale.bfloat16().float().clamp(min=2.0**-126)


def fake_quantize_activation(x: Tensor, grid: Grid, scale: Tensor | None = None) -> Tensor:
    """Round a layer's input to the format's activation grid and back.

    Args:
        x: [..., K] float32, or bfloat16, which the search may compute in.
        grid: the format's activation grid.
        scale: float32 []: of static grids; e2m1's global scale; of integers with dynamic scales the part of the largest
            magnitude that is kept, None for all of it.

    Returns:
        Same shape, float32; what is not rounded stays as it is.
    """
    if grid.element is Element.FP32:
        return x
    if grid.is_float:
        return x.to(plain_type(grid)).float()
    if grid.dynamic:
        return _fake_quantize_dynamic(x, grid, scale)
    assert scale is not None, "static grids need a scale"
    x = x.float()
    if grid.element is Element.E2M1:
        return _fake_quantize_blocks(x, grid, scale)
    return round_to_grid(x / scale, grid).mul_(scale)


def _fake_quantize_dynamic(x: Tensor, grid: Grid, ratio: Tensor | None) -> Tensor:
    """Integers with a scale for every token, or every group of its channels: ratio * largest magnitude / maximum."""
    groups = x.unflatten(-1, (-1, group_width(grid, x.shape[-1])))
    largest = groups.abs().amax(dim=-1, keepdim=True).float()
    # The floor keeps an all-zero token finite; it is far below any real activation.
    step = ((largest if ratio is None else largest * ratio) / grid.maximum).clamp(min=SMALLEST_STEP)
    if grid.granularity is Granularity.GROUP:
        step = eight_bits(step)
    points = (groups / step).round_()
    if ratio is not None or grid.granularity is Granularity.GROUP:  # else the largest quotient is the maximum
        points.clamp_(-grid.maximum, grid.maximum)
    rounded: Tensor = points.mul_(step).flatten(-2)
    return rounded


def eight_bits(values: Tensor) -> Tensor:
    """Nearest numbers of eight significant bits by arithmetic that graphs can hold (Veltkamp's splitting); float32."""
    wide = values * SPLITTER
    return wide - (wide - values)


def _fake_quantize_blocks(x: Tensor, grid: Grid, global_scale: Tensor) -> Tensor:
    """NVFP4: e2m1 elements, e4m3 scale per block of 16, float32 global scale; zero blocks stay zero."""
    blocks = x.reshape(*x.shape[:-1], -1, grid.group_size)
    scale = round_e4m3(blocks.abs().amax(dim=-1, keepdim=True) / (E2M1_MAX * global_scale)) * global_scale
    points = round_e2m1(blocks / torch.where(scale > 0, scale, torch.ones_like(scale)))
    return points.mul_(scale).reshape(x.shape)

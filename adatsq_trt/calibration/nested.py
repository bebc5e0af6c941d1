"""One copy of a weight for two widths: the 8-bit codes are 16 * high + low, and the 4-bit codes are `high` alone.

Both planes are int4, so a layer that is nested takes 8 bits per weight where two copies take 12. The price is paid in
error: an 8-bit code fixes the cell of its high plane, while GPTQ moves a 4-bit code out of the nearest cell more often
than not. How much each width loses is measured as tr(ΔW H ΔWᵀ) over that of a copy of its own
(`benchmarks/nested`).

Scales are the plugin's: one for each output channel and 64 inputs for the 4-bit width, one for each output channel for
the 8-bit width, unless a group is asked for there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from adatsq_trt.calibration.gptq import damped_hessian, feedback_factor, gptq_columns
from adatsq_trt.formats import FORMATS, GROUP, Format
from adatsq_trt.packing import join_planes, split_planes
from adatsq_trt.quantizers import QuantizedWeight, dequantize_weight, round_scale

NARROW, WIDE = FORMATS["w4a8"], FORMATS["w8a8"]
LIMIT = 1.5  # largest error of either width, relative to a copy of its own, at which a layer is nested
_LARGEST = 16 * 7 + 7  # of the 8-bit codes
_ROUNDS, _SWEEPS = 3, 2  # after three rounds of two sweeps errors fall by less than 2 % a round
_FIRST_BALANCE = 4.0  # weight of the narrow error to begin with: near where most layers end


@dataclass(frozen=True)
class NestedWeight:
    """A weight in two planes.

    Attributes:
        high: int8 [N, K] in [-7, 7].
        low: int8 [N, K] in [-8, 7].
        narrow_scales: of `high` as 4-bit codes, float32 [N, K / 64].
        wide_scales: of 16 * high + low, float32 [N, 1] or [N, K / group].
    """

    high: Tensor
    low: Tensor
    narrow_scales: Tensor
    wide_scales: Tensor

    @property
    def narrow(self) -> QuantizedWeight:
        """The weight that the 4-bit width reads: the high plane alone."""
        return QuantizedWeight(self.high, self.narrow_scales)

    @property
    def wide(self) -> QuantizedWeight:
        """The weight that the 8-bit width reads: both planes joined."""
        return QuantizedWeight(join_planes(self.high, self.low), self.wide_scales)


def weighted_error(weight: Tensor, quantized: QuantizedWeight, fmt: Format, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ), the mean squared error of the layer's output, summed over channels.

    Args:
        weight: float32 [N, K].
        quantized: the same in `fmt`, or in its grid with another granularity.
        fmt: its format.
        hessian: float32 [K, K].
    """
    delta = (dequantize_weight(quantized, fmt) - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())


def nest(
    weight: Tensor, hessian: Tensor, narrow: QuantizedWeight, wide: QuantizedWeight, damping: float = 0.01
) -> NestedWeight | None:
    """Nest a layer where both widths stay within LIMIT of the copies that they would replace.

    Args:
        weight: float32 [N, K]; K is a multiple of 64.
        hessian: float32 [K, K].
        narrow: the 4-bit copy.
        wide: the 8-bit copy.
        damping: as for `gptq`.

    Returns:
        The planes, or None where two copies are to be kept.
    """
    errors = weighted_error(weight, narrow, NARROW, hessian), weighted_error(weight, wide, WIDE, hessian)
    nested = solve_jointly(weight, hessian, errors, damping=damping, give_up=2 * LIMIT)
    both = (nested.narrow, NARROW, errors[0]), (nested.wide, WIDE, errors[1])
    close = all(weighted_error(weight, own, fmt, hessian) <= LIMIT * error for own, fmt, error in both)
    return nested if close else None


def split_rounded(weight: Tensor, hessian: Tensor, group: int | None = None, damping: float = 0.01) -> NestedWeight:
    """GPTQ for the 8-bit width, whose codes are rounded to the nearest `high`; narrow scales fitted afterwards.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K].
        group: inputs that share a scale of the 8-bit width; None for all.
        damping: as for `gptq`.
    """
    damped, order = damped_hessian(hessian, damping)
    scales = _widest_scales(weight, group)
    wide = _per_input(scales, weight)
    solved = gptq_columns(weight, feedback_factor(damped, order), order, scales, WIDE.weight)
    codes = (solved / wide).round().clamp(-_LARGEST - 1, _LARGEST)
    high, low = split_planes(codes.to(torch.int8))
    narrow_scales = 16 * _widest_scales(weight, GROUP)
    return NestedWeight(high, low, _fitted_scales(weight, damped.float(), high, narrow_scales), scales)


def solve_jointly(
    weight: Tensor,
    hessian: Tensor,
    errors: tuple[float, float],
    group: int | None = None,
    damping: float = 0.01,
    give_up: float = inf,
) -> NestedWeight:
    """Both planes under the Hessian: GPTQ that carries an error for each width, then coordinate descent.

    It minimizes balance * narrow error + wide error, in units of `errors`, by turns in the codes (column by column,
    both planes at once) and in the scales (least squares). The balance moves until both widths lose alike.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K].
        errors: of copies of their own: of the 4-bit and of the 8-bit width.
        group: inputs that share a scale of the 8-bit width; None for all.
        damping: as for `gptq`.
        give_up: a loss of either width at which further rounds are not worth their time.
    """
    damped, order = damped_hessian(hessian, damping)
    # Descent needs no inverse, so only as much damping as keeps the scales' equations solvable.
    light = damped_hessian(hessian, damping / 10)[0].float()
    wide_scales = _widest_scales(weight, group)
    narrow_scales = 16 * wide_scales.repeat_interleave(weight.shape[1] // GROUP // wide_scales.shape[1], dim=1)
    units, balance = [1 / max(error, 1e-30) for error in errors], _FIRST_BALANCE
    cost = _Cost(balance * units[0], units[1], _per_input(narrow_scales, weight), _per_input(wide_scales, weight))
    planes = _joint_gptq(weight, feedback_factor(damped, order), order, cost)
    for _ in range(_ROUNDS):
        planes = _descend(weight, light, planes, cost)
        high, low = (plane.to(torch.int8) for plane in planes)
        narrow_scales = _fitted_scales(weight, light, high, narrow_scales)
        wide_scales = _fitted_scales(weight, light, join_planes(high, low), wide_scales)
        nested = NestedWeight(high, low, narrow_scales, wide_scales)
        losses = [
            unit * weighted_error(weight, own, fmt, hessian)
            for unit, own, fmt in zip(units, (nested.narrow, nested.wide), (NARROW, WIDE), strict=True)
        ]
        if max(losses) > give_up:
            break
        balance *= min(max(losses[0] / max(losses[1], 1e-30), 0.5), 2.0)
        cost = _Cost(balance * units[0], units[1], _per_input(narrow_scales, weight), _per_input(wide_scales, weight))
    return nested


@dataclass(frozen=True)
class _Cost:
    """Cost of a rounding: weights of both widths' squared errors, and their scales, float32 [N, K]."""

    narrow: float
    wide: float
    narrow_scales: Tensor
    wide_scales: Tensor

    def best(self, column: int, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Cheapest codes for what the widths should be: float32 [N] each; all 15 highs, each with its best low."""
        narrow_scale, wide_scale = self.narrow_scales[:, column, None], self.wide_scales[:, column, None]
        high = torch.arange(-7.0, 8.0, device=narrow.device)
        low = ((wide[:, None] / wide_scale).round() - 16 * high).clamp(-8, 7)
        cost = self.narrow * (narrow[:, None] - high * narrow_scale).square()
        cost += self.wide * (wide[:, None] - (16 * high + low) * wide_scale).square()
        index = cost.argmin(dim=1)
        return high[index], low.gather(1, index[:, None])[:, 0]

    def values(self, column: int, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The widths' weights of one column."""
        return high * self.narrow_scales[:, column], (16 * high + low) * self.wide_scales[:, column]


def _joint_gptq(weight: Tensor, feedback: Tensor, order: Tensor, cost: _Cost) -> tuple[Tensor, Tensor]:
    """GPTQ with one choice of both planes per column; either width hands its own error to the columns to come."""
    widths = weight[:, order].clone(), weight[:, order].clone()
    high, low = torch.empty_like(weight), torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        targets = widths[0][:, j], widths[1][:, j]
        high[:, column], low[:, column] = cost.best(column, *targets)
        for left, value in zip(widths, cost.values(column, high[:, column], low[:, column]), strict=True):
            left[:, j + 1 :] += (weight[:, column] - value)[:, None] * feedback[j, j + 1 :]
    return high, low


def _descend(weight: Tensor, hessian: Tensor, planes: tuple[Tensor, Tensor], cost: _Cost) -> tuple[Tensor, Tensor]:
    """Make passes over the columns; each takes the codes that are best while all others stay."""
    high, low = (plane.clone() for plane in planes)
    gradients = [
        (high * cost.narrow_scales - weight) @ hessian,
        ((16 * high + low) * cost.wide_scales - weight) @ hessian,
    ]
    diagonal = hessian.diagonal()
    for column in [*range(weight.shape[1])] * _SWEEPS:
        old = cost.values(column, high[:, column], low[:, column])
        targets = [
            value - gradient[:, column] / diagonal[column] for value, gradient in zip(old, gradients, strict=True)
        ]
        high[:, column], low[:, column] = cost.best(column, *targets)
        new = cost.values(column, high[:, column], low[:, column])
        for gradient, before, after in zip(gradients, old, new, strict=True):
            gradient += (after - before)[:, None] * hessian[column]
    return high, low


def _widest_scales(weight: Tensor, group: int | None) -> Tensor:
    """Scales [N, K / group] at which no 8-bit code is clipped."""
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    return round_scale(groups.abs().amax(dim=2) / _LARGEST)


def _per_input(scales: Tensor, weight: Tensor) -> Tensor:
    """[N, groups] → [N, K]."""
    return scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)


def _fitted_scales(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Least squares: scales that minimize the weighted error of given codes; old ones where that gives none above 0."""
    groups = scales.shape[1]
    exact, wanted, given = hessian.double(), weight.double(), codes.double()
    normal, right = exact.new_empty(len(codes), groups, groups), exact.new_empty(len(codes), groups)
    for index, part in enumerate(torch.arange(codes.shape[1], device=codes.device).chunk(groups)):
        projected = given[:, part] @ exact[part]
        normal[:, index] = (projected * given).unflatten(1, (groups, -1)).sum(dim=2)
        right[:, index] = (projected * wanted).sum(dim=1)
    normal.diagonal(dim1=1, dim2=2).add_(1e-9 * exact.trace())  # for groups of zeros
    fitted = torch.linalg.solve(normal, right).float()
    return round_scale(torch.where(fitted > 0, fitted, scales))

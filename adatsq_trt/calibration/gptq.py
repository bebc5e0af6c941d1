"""GPTQ: round a weight column by column and let the columns to come repair the error (Frantar et al. 2022).

Minimizes tr((W - Ŵ) H (W - Ŵ)ᵀ) with H damped by `damping` times its mean diagonal. H is the *mean* second moment of
the layer's input, weighted over steps; GPTQ is invariant to H's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.formats import Format, Grid
from adatsq_trt.quantize import (
    QuantizedWeight,
    encode_weight,
    group_width,
    plain_type,
    round_to_grid,
    search_scale,
    weight_global_scale,
)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: Format,
    *,
    damping: float = 0.01,
    block: int = 64,
    activation_order: bool = True,
) -> QuantizedWeight:
    """Quantize one layer's weight.

    Args:
        weight: [N, K] float32.
        hessian: [K, K] float32, symmetric positive semidefinite.
        fmt: any format; plain floating formats are rounded to nearest.
        damping: added to the diagonal, as a part of its mean over inputs that are not always zero.
        block: columns whose updates to the rest are applied together.
        activation_order: visit the columns with the largest diagonal first.

    Returns:
        The weight on the format's grid; scales as the format stores them.
    """
    if fmt.weight.is_float:
        return QuantizedWeight(weight.to(plain_type(fmt.weight)))
    return gptq_factored(weight, factorize(hessian, damping, activation_order), fmt, block)


@dataclass(frozen=True)
class FactoredHessian:
    """What GPTQ needs to know of a Hessian: the same for all formats of a layer.

    Attributes:
        importance: damped diagonal, float32 [K].
        order: in which columns are visited, int64 [K].
        factor: upper Cholesky factor of the damped inverse in that order, float32 [K, K].
    """

    importance: Tensor
    order: Tensor
    factor: Tensor


def factorize(hessian: Tensor, damping: float = 0.01, activation_order: bool = True) -> FactoredHessian:
    """Damp a Hessian and factorize its inverse; takes 24 K² bytes for a while.

    Args:
        hessian: [K, K] float32, symmetric positive semidefinite.
        damping: added to the diagonal, as a part of its mean over inputs that are not always zero.
        activation_order: visit the columns with the largest diagonal first.
    """
    damped, order = damped_hessian(hessian, damping, activation_order)
    importance = damped.diagonal().float()
    damped = damped[order[:, None], order]  # the damped one in the columns' own order is gone from here on
    return FactoredHessian(importance, order, inverse_factor(damped))


def gptq_factored(weight: Tensor, hessian: FactoredHessian, fmt: Format, block: int = 64) -> QuantizedWeight:
    """`gptq` with a Hessian that has been factorized already.

    Args:
        weight: [N, K] float32.
        hessian: of the layer's inputs.
        fmt: any format but plain floating ones.
        block: columns whose updates to the rest are applied together.
    """
    grid, order = fmt.weight, hessian.order
    global_scale = weight_global_scale(weight, grid)
    scales = _group_scales(weight, hessian.importance, grid, global_scale)
    columns = torch.arange(weight.shape[1]) // group_width(grid, weight.shape[1])
    permuted = gptq_columns(weight[:, order].clone(), hessian.factor, scales[:, columns[order]], grid, block)
    return encode_weight(permuted[:, order.argsort()], scales, grid, global_scale)


def damped_hessian(hessian: Tensor, damping: float, activation_order: bool = True) -> tuple[Tensor, Tensor]:
    """Damped float64 Hessian and the order of the columns; dead inputs get the mean diagonal of the live ones."""
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()  # filling in their mean has left it the mean of the live ones
    order = diagonal.argsort(descending=True, stable=True) if activation_order else torch.arange(len(damped))
    return damped, order


def _group_scales(weight: Tensor, importance: Tensor, grid: Grid, global_scale: Tensor | None) -> Tensor:
    """Effective scales [N, groups], chosen before any column moves, so that any column order can be used."""
    width = group_width(grid, weight.shape[1])
    scales = [
        search_scale(weight[:, start : start + width], grid, global_scale, importance[start : start + width])
        for start in range(0, weight.shape[1], width)
    ]
    return torch.cat(scales, dim=1)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, float32 [K, K]: row j holds what column j's error does to later ones."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def gptq_columns(weight: Tensor, factor: Tensor, scales: Tensor, grid: Grid, block: int = 64) -> Tensor:
    """The column loop: returns dequantized grid points, float32 [N, K]; `weight` is used up."""
    width = weight.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty(len(weight), stop - start)
        for j in range(start, stop):
            rounded = round_to_grid(weight[:, j] / scales[:, j], grid) * scales[:, j]
            error = (weight[:, j] - rounded) / factor[j, j]
            weight[:, j] = rounded
            weight[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight

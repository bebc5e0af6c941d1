"""GPTQ: round a weight column by column and let the columns to come repair the error (Frantar et al. 2022).

Minimizes tr((W - Ŵ) H (W - Ŵ)ᵀ) with H damped by `damping` times its mean diagonal. H is the *mean* second moment of
the layer's input, weighted over steps; GPTQ is invariant to H's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.formats import Format, Grid
from adatsq_trt.quantizers import (
    SEARCHED_SCALE_MAX,
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
    """A Hessian factored for GPTQ: the same for all formats of a layer.

    Attributes:
        importance: damped diagonal, float32 [K].
        order: in which columns are visited, int64 [K].
        feedback: factors of a column's error in the columns visited later, float32 [K, K] (`feedback_factor`).
    """

    importance: Tensor
    order: Tensor
    feedback: Tensor


def factorize(hessian: Tensor, damping: float = 0.01, activation_order: bool = True) -> FactoredHessian:
    """Damp a Hessian and factorize it; takes 24 K² bytes for a while.

    Args:
        hessian: [K, K] float32, symmetric positive semidefinite.
        damping: added to the diagonal, as a part of its mean over inputs that are not always zero.
        activation_order: visit the columns with the largest diagonal first.
    """
    damped, order = damped_hessian(hessian, damping, activation_order)
    return FactoredHessian(damped.diagonal().float(), order, feedback_factor(damped, order))


def gptq_factored(weight: Tensor, hessian: FactoredHessian, fmt: Format, block: int = 64) -> QuantizedWeight:
    """`gptq` with a Hessian that has been factorized already.

    Args:
        weight: [N, K] float32.
        hessian: of the layer's inputs.
        fmt: any format but plain floating ones.
        block: columns whose updates to the rest are applied together.
    """
    grid = fmt.weight
    global_scale = weight_global_scale(weight, grid, SEARCHED_SCALE_MAX)
    scales = _group_scales(weight, hessian.importance, grid, global_scale)
    values = gptq_columns(weight, hessian.feedback, hessian.order, scales, grid, block)
    return encode_weight(values, scales, grid, global_scale)


def damped_hessian(hessian: Tensor, damping: float, activation_order: bool = True) -> tuple[Tensor, Tensor]:
    """Damped float64 Hessian and the order of the columns; dead inputs get the mean diagonal of the live ones."""
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()  # filling in their mean has left it the mean of the live ones
    order = (
        diagonal.argsort(descending=True, stable=True)
        if activation_order
        else torch.arange(len(damped), device=damped.device)
    )
    return damped, order


def _group_scales(weight: Tensor, importance: Tensor, grid: Grid, global_scale: Tensor | None) -> Tensor:
    """Effective scales [N, groups], chosen before any column moves, so that any column order can be used."""
    width = group_width(grid, weight.shape[1])
    scales = [
        search_scale(weight[:, start : start + width], grid, global_scale, importance[start : start + width])
        for start in range(0, weight.shape[1], width)
    ]
    return torch.cat(scales, dim=1)


def feedback_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Compute the factors of every column's error in the later columns, float32 [K, K], unit upper triangular.

    With H = R Rᵀ and R upper triangular, the error is ||ΔW R||², and column j's part of it vanishes where column j is
    rounded from w_j + Σ_{i<j} (w_i - ŵ_i) R_ij / R_jj. That is GPTQ without the inverse of H (Chen et al. 2025, "The
    geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm"), and one Cholesky factorization in place of
    two and an inversion.

    Args:
        hessian: float64 [K, K], positive definite.
        order: in which the columns are rounded; rows and columns of the result are in this order.
    """
    backwards = order.flip(0)
    reversed_hessian = hessian.float()[backwards][:, backwards]
    lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
    if failed:  # single precision takes half the time, and is too little for a few layers with huge inputs
        lower = torch.linalg.cholesky(hessian[backwards][:, backwards]).float()
    upper: Tensor = lower.flip(0, 1)
    upper /= upper.diagonal().clone()
    return upper


def gptq_columns(
    weight: Tensor, feedback: Tensor, order: Tensor, scales: Tensor, grid: Grid, block: int = 64
) -> Tensor:
    """The column loop.

    Args:
        weight: float32 [N, K].
        feedback: of `feedback_factor`.
        order: in which the columns are rounded.
        scales: effective ones, float32 [N, K / group].
        grid: integers, e4m3 or e2m1.
        block: columns whose errors are added up together.

    Returns:
        Dequantized grid points, float32 [N, K].
    """
    # Transposed, so that a column lies in one piece.
    scale_of = (order // (weight.shape[1] // scales.shape[1])).tolist()
    weight, scales = weight.mT.contiguous()[order], scales.mT.contiguous()
    rounded, errors = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        wanted = torch.addmm(weight[start:stop], feedback[:start, start:stop].mT, errors[:start])
        for j in range(start, stop):
            scale = scales[scale_of[j]]
            torch.mul(round_to_grid(wanted[j - start] / scale, grid), scale, out=rounded[j])
            torch.sub(weight[j], rounded[j], out=errors[j])
            wanted[j - start + 1 :].addr_(feedback[j, j + 1 : stop], errors[j])
    return rounded[order.argsort()].mT.contiguous()

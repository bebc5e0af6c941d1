"""Reference of a GEMM's result: the exact sum, and how far rounding may take a kernel from it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A linear layer's result without rounding.

    Attributes:
        value: y = x̂ ŵᵀ + b, float64 [M, N].
        magnitude: |x̂| |ŵ|ᵀ + |b|, float64 [M, N]: the sum of what is added up, which bounds errors of addition.
    """

    value: Tensor
    magnitude: Tensor

    def bound(self, dtype: torch.dtype, roundings: int, unit: float = 2.0**-24) -> Tensor:
        """Largest |y - value| that rounding explains, float64 [M, N].

        The result is rounded once to `dtype`, which is half its epsilon of the value (or half its smallest number).
        Before that each summand went through at most `roundings` operations of relative error `unit`: whatever the
        order of a sum, its error is at most that many units of the magnitude (Higham, Accuracy and Stability of
        Numerical Algorithms, section 4.2).

        Args:
            dtype: of y.
            roundings: operations between a product and the result.
            unit: relative error of one; 2^-24 is float32's, rounded to nearest.
        """
        kind = torch.finfo(dtype)
        before = 1.01 * roundings * unit * self.magnitude  # 1.01: terms of second order
        return before + (self.value.abs() + before) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Reference:
    """The layer on dequantized numbers.

    Args:
        x: [M, K] float64.
        w: [N, K] float64.
        bias: [N], any type.
    """
    b = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    return Reference(x @ w.T + b, x.abs() @ w.abs().T + b.abs())


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [R, K] times scales [R] or [R, K / group], float64."""
    wide = scales.double().reshape(len(codes), -1)
    return codes.double() * wide.repeat_interleave(codes.shape[1] // wide.shape[1], dim=1)

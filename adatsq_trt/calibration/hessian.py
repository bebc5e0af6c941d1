"""Second moments X Xᵀ, the terms of the weighted Hessians H'_l = Σ_t alpha[t,l] X[t,l] X[t,l]ᵀ (paper, section 3.3)."""

from __future__ import annotations

from torch import Tensor


def second_moment(inputs: Tensor) -> Tensor:
    """Mean over rows of x xᵀ.

    Normalized by the number of rows, so that alpha alone decides how much a step weighs.

    Args:
        inputs: float32 [..., K].

    Returns:
        float32 [K, K].
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows.mT @ rows / len(rows)

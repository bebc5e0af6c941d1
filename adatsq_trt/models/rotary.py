"""Rotary position embeddings in real arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers by an angle each: (a, b) → (a cos - b sin, a sin + b cos).

    Args:
        x: [B, S, heads, D].
        cosines: of the angles, [..., S, 1, D / 2].
        sines: likewise.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosines - b * sines, a * sines + b * cosines], dim=-1).flatten(-2)

"""Rotary position embeddings in real arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adatsq_trt.errors import MismatchError


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers by an angle each: (a, b) → (a cos - b sin, a sin + b cos).

    Args:
        x: [B, S, heads, D].
        cosines: of the angles, [..., S, 1, D / 2].
        sines: likewise.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosines - b * sines, a * sines + b * cosines], dim=-1).flatten(-2)


def require_positions(wanted: Sequence[int], most: Sequence[int]) -> None:
    """Refuse more positions along an axis than a model's tables have.

    Args:
        wanted: positions along each axis.
        most: positions that the tables have along each axis.

    Raises:
        MismatchError: says how many.
    """
    if any(count > limit for count, limit in zip(wanted, most, strict=True)):
        raise MismatchError(
            f"{' x '.join(map(str, wanted))} positions: the model's tables have {' x '.join(map(str, most))}; choose a "
            "smaller size"
        )

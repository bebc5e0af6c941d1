"""Bit packing: pure tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes two to a byte, the earlier element in the low nibble, as ONNX stores INT4 and FLOAT4E2M1.

    Args:
        codes: any shape, int8 in [-8, 7] or uint8 in [0, 15].

    Returns:
        uint8 [ceil(n / 2)]; an odd count is padded with zero.
    """
    flat = codes.reshape(-1).to(torch.int16) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Signed 4-bit codes of packed bytes, the low nibble first.

    Args:
        packed: [..., n] uint8 or int8.

    Returns:
        int8 [..., 2 n] in [-8, 7].
    """
    nibbles = torch.stack([packed & 15, (packed >> 4) & 15], dim=-1).to(torch.int8)
    return ((nibbles ^ 8) - 8).flatten(-2)


def split_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Split 8-bit codes into two 4-bit planes: codes = 16 * high + low, in one way only.

    Args:
        codes: int8 in [-120, 119], any shape.

    Returns:
        high in [-7, 7] and low in [-8, 7], int8, the same shape.
    """
    wide = codes.to(torch.int16) + 8
    return (wide >> 4).to(torch.int8), ((wide & 15) - 8).to(torch.int8)


def join_planes(high: Tensor, low: Tensor) -> Tensor:
    """The 8-bit codes 16 * high + low, int8; what `split_planes` splits."""
    return 16 * high + low

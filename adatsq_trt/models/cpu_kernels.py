"""Rounding activations in one pass on one processor: the same numbers as `quantizers.fake_quantize_activation`.

PyTorch's operations go through memory once for each step of the arithmetic, so rounding takes longer than the matrix
product that follows. Loops here work row by row, in the processor's first cache. Numba compiles a kernel in about a
second, in each process that uses it.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from adatsq_trt.formats import Element, Grid
from adatsq_trt.quantizers import E2M1_MAX, E4M3_MAX


def round_rows(x: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """`fake_quantize_activation` of e4m3 with a static scale, or of e2m1 in blocks of 16.

    Args:
        x: float32 [..., K] on the CPU, contiguous.
        grid: one of these.
        scale: float32 [], as there.

    Returns:
        float32 [..., K].
    """
    rounded = torch.empty_like(x)
    rows, out = (tensor.detach().reshape(-1, x.shape[-1]).numpy() for tensor in (x, rounded))
    kernel = _round_blocks if grid.element is Element.E2M1 else _round_e4m3
    kernel(rows, out, np.float32(float(scale)))
    return rounded


_E4M3, _E2M1, _WIDTH = np.float32(E4M3_MAX), np.float32(E2M1_MAX), 16
_EXPONENT, _MAGNITUDE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
# Exponents of e4m3's smallest normal number, and of what pushes all but three bits of a mantissa out of float32's.
_FIRST, _PUSH, _HALF = np.int32((127 - 6) << 23), np.int32((23 - 3) << 23), np.float32(1.5)
# Added and subtracted again they leave halves, ones and twos: what e2m1 has below 2, from 2 and from 4 on.
_TWO, _FOUR = np.float32(2), np.float32(4)
_HALVES, _ONES, _TWOS = np.float32(1.5 * 2**22), np.float32(1.5 * 2**23), np.float32(1.5 * 2**24)


@njit(nogil=True)
def _to_e4m3(values, magic):
    """Round float32 [n] to e4m3 in place, as `quantizers._round_mantissa` does; `magic` is float32 [n] to work in."""
    bits, powers = values.view(np.int32), magic.view(np.int32)
    for i in range(len(values)):
        value = values[i]
        value = _E4M3 if value > _E4M3 else value
        values[i] = -_E4M3 if value < -_E4M3 else value
    for i in range(len(values)):
        powers[i] = max(bits[i] & _EXPONENT, _FIRST) + _PUSH
    for i in range(len(values)):
        large = magic[i] * _HALF
        values[i] = np.copysign((values[i] + large) - large, values[i])


@njit(nogil=True)
def _round_e4m3(x, out, scale):
    magic = np.empty(x.shape[1], dtype=np.float32)
    for row in range(len(x)):
        own = out[row]
        for i in range(x.shape[1]):
            own[i] = x[row, i] / scale
        _to_e4m3(own, magic)
        for i in range(x.shape[1]):
            own[i] = own[i] * scale


@njit(nogil=True)
def _round_blocks(x, out, global_scale):
    """NVFP4: e2m1 numbers, an e4m3 scale for each block, a float32 global scale."""
    blocks = x.shape[1] // _WIDTH
    bits, largest = x.view(np.int32), np.empty(blocks, dtype=np.int32)
    scales, magic = largest.view(np.float32), np.empty(blocks, dtype=np.float32)
    most = _E2M1 * global_scale
    for row in range(len(x)):
        for block in range(blocks):
            highest = np.int32(0)  # magnitudes are in the order of their bits, and NaN is above all
            for i in range(_WIDTH):
                highest = max(highest, bits[row, block * _WIDTH + i] & _MAGNITUDE)
            largest[block] = highest
        for block in range(blocks):
            scales[block] = scales[block] / most
        _to_e4m3(scales, magic)
        for block in range(blocks):
            scale = scales[block] * global_scale
            divisor = scale if scale > 0 else np.float32(1)
            for i in range(_WIDTH):
                place = block * _WIDTH + i
                value = x[row, place] / divisor
                value = _E2M1 if value > _E2M1 else value
                value = -_E2M1 if value < -_E2M1 else value
                size = abs(value)
                large = _HALVES if size < _TWO else (_ONES if size < _FOUR else _TWOS)
                out[row, place] = np.copysign((value + large) - large, value) * scale

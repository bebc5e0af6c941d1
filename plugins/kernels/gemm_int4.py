"""GEMMs of packed int4 weights in groups, with int8 or 16-bit activations."""

import triton
import triton.language as tl
from torch import Tensor

from adatsq_trt.packing import unpack_nibbles
from adatsq_trt.plugins.kernels.reference import Reference, linear, scaled
from adatsq_trt.plugins.kernels.tile import row_pointers, store_tile, tile_position


@triton.jit
def gemm_w4a8(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    y,
    m,
    n,
    k,
    has_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = (x · x_scale) (w · w_scale)ᵀ + bias.

    A group's sum is exact in int32, then scaled and added in float32.

    Args:
        x: [M, K] int8, by quantize_tokens in even-odd order.
        x_scale: [M] float32.
        w: [N, K / 2] int8: two codes in [-8, 7] to a byte, the even k in the low nibble.
        w_scale: [N, K / BLOCK_K] float32.
        bias: [N] in y's type; not read when has_bias is 0.
        y: [M, N] float16 or bfloat16.
        m, n, k: the shape; K is a multiple of BLOCK_K.
        has_bias: 0 or 1.
        BLOCK_M, BLOCK_N: the tile.
        BLOCK_K: the group, 64 or 128.
        GROUP_M: blocks of tokens that run together.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    # The compiler cannot conclude from K that half of it keeps rows aligned to 16 bytes.
    half, groups = tl.multiple_of(k // 2, 16), k // BLOCK_K
    x_rows, w_rows = row_pointers(x, tokens, m, k)[None, :], row_pointers(w, features, n, half)[:, None]
    scale_rows = row_pointers(w_scale, features, n, groups)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(0, groups):
        pair = group * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(w_rows + pair[None, :])
        even, odd = tl.load(x_rows + pair[:, None]), tl.load(x_rows + half + pair[:, None])
        # Nibbles at the top of their bytes, 16 times their value: two operations instead of sign extensions. The sum
        # of a group stays below 2^21, so float32 holds it exactly, and the scale of x takes the 16 off again.
        total = tl.dot(packed << 4, even, out_dtype=tl.int32)
        total = tl.dot(packed & -16, odd, total, out_dtype=tl.int32)
        acc += total.to(tl.float32) * tl.load(scale_rows + group)[:, None]
    values = acc * (tl.load(x_scale + tokens, mask=tokens < m, other=0.0) / 16)[None, :]
    store_tile(values, bias, y, tokens, features, m, n, has_bias)


@triton.jit
def _nibbles(packed, dtype: tl.constexpr):
    """Low nibbles as numbers in [-8, 7], exact; converting integers takes several times as long.

    At 128 in bfloat16 and 1024 in float16, neighbours are 1 apart: code + 8 in the last bits adds itself.
    """
    offset: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
    bits: tl.constexpr = 0x4308 if dtype == tl.bfloat16 else 0x6408
    value = ((packed.to(tl.int16) & 15) ^ bits).to(dtype, bitcast=True)
    return (value.to(tl.float32) - offset).to(dtype)


@triton.jit
def gemm_w4a16(
    x,
    w,
    w_scale,
    bias,
    y,
    m,
    n,
    k,
    has_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y = x (w · w_scale)ᵀ + bias.

    Codes are exact in 16 bits. Scales are not, so they multiply a group's float32 sum.

    What differs from gemm_w4a8:

    Args:
        x: [M, K] in y's type.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    half, groups = tl.multiple_of(k // 2, 16), k // BLOCK_K
    dtype: tl.constexpr = y.dtype.element_ty
    # Two neighbours are read as one 32-bit word, which is split in registers: even and odd k, as the nibbles are.
    x_rows = row_pointers(x.to(tl.pointer_type(tl.int32)), tokens, m, half)[None, :]
    w_rows, scale_rows = row_pointers(w, features, n, half)[:, None], row_pointers(w_scale, features, n, groups)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(0, groups):
        pair = group * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        packed, words = tl.load(w_rows + pair[None, :]), tl.load(x_rows + pair[:, None])
        even, odd = words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        total = tl.dot(_nibbles(packed, dtype), even)
        total = tl.dot(_nibbles(packed >> 4, dtype), odd, total)
        acc += total * tl.load(scale_rows + group)[:, None]
    store_tile(acc, bias, y, tokens, features, m, n, has_bias)


def gemm_w4a8_reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_w4a8, but x in natural order."""
    return linear(scaled(x, x_scale), scaled(unpack_nibbles(w), w_scale), bias)


def gemm_w4a16_reference(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_w4a16."""
    return linear(x.double(), scaled(unpack_nibbles(w), w_scale), bias)

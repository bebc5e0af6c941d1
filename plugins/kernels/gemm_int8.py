"""GEMMs of int8 activations and int8 weights: stored as such, or nested in two int4 planes."""

import triton
import triton.language as tl
from torch import Tensor

from adatsq_trt.packing import unpack_nibbles
from adatsq_trt.plugins.kernels.reference import Reference, linear, scaled
from adatsq_trt.plugins.kernels.tile import row_pointers, store_tile, tile_position


@triton.jit
def _scale_and_store(acc, x_scale, w_scale, bias, y, tokens, features, m, n, has_bias):
    """Multiply int32 sums [BLOCK_N, BLOCK_M] with the scales of tokens and output features, then write them."""
    by_token = tl.load(x_scale + tokens, mask=tokens < m, other=0.0)
    by_feature = tl.load(w_scale + features, mask=features < n, other=0.0)
    values = acc.to(tl.float32) * by_feature[:, None] * by_token[None, :]
    store_tile(values, bias, y, tokens, features, m, n, has_bias)


@triton.jit
def gemm_w8a8(
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

    Args:
        x: [M, K] int8, by quantize_tokens in natural order.
        x_scale: [M] float32.
        w: [N, K] int8.
        w_scale: [N] float32.
        bias: [N] in y's type; not read when has_bias is 0.
        y: [M, N] float16 or bfloat16.
        m, n, k: the shape.
        has_bias: 0 or 1.
        BLOCK_M, BLOCK_N, BLOCK_K: the tile.
        GROUP_M: blocks of tokens that run together.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    x_rows, w_rows = row_pointers(x, tokens, m, k), row_pointers(w, features, n, k)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        right = tl.load(x_rows[None, :] + inner[:, None], mask=(inner < k)[:, None], other=0)
        left = tl.load(w_rows[:, None] + inner[None, :], mask=(inner < k)[None, :], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    _scale_and_store(acc, x_scale, w_scale, bias, y, tokens, features, m, n, has_bias)


@triton.jit
def gemm_w8a8_nested(
    x,
    x_scale,
    w_high,
    w_low,
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
    """Compute gemm_w8a8 with w = 16 · w_high + w_low.

    What differs from gemm_w8a8:

    Args:
        x: [M, K] int8, by quantize_tokens in even-odd order.
        w_high: [N, K / 2] int8: two codes in [-7, 7] to a byte, the even k in the low nibble.
        w_low: likewise, codes in [-8, 7].
        k: a multiple of 32, which that of any group is.
        BLOCK_K: elements of K at a time, half of them even.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    # The compiler cannot conclude from K that half of it keeps rows aligned to 16 bytes.
    half = tl.multiple_of(k // 2, 16)
    x_rows = row_pointers(x, tokens, m, k)[None, :]
    high_rows, low_rows = row_pointers(w_high, features, n, half), row_pointers(w_low, features, n, half)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(0, half, BLOCK_K // 2):
        pair = start + tl.arange(0, BLOCK_K // 2)
        left, right = (pair < half)[None, :], (pair < half)[:, None]
        high = tl.load(high_rows[:, None] + pair[None, :], mask=left, other=0)
        low = tl.load(low_rows[:, None] + pair[None, :], mask=left, other=0)
        even = tl.load(x_rows + pair[:, None], mask=right, other=0)
        odd = tl.load(x_rows + half + pair[:, None], mask=right, other=0)
        # A nibble shifted to the top of its byte is 16 times its value.
        acc = tl.dot((high << 4) + ((low << 4) >> 4), even, acc, out_dtype=tl.int32)
        acc = tl.dot(((high >> 4) << 4) + (low >> 4), odd, acc, out_dtype=tl.int32)
    _scale_and_store(acc, x_scale, w_scale, bias, y, tokens, features, m, n, has_bias)


# Int32 sums are exact; then come their conversion, two scales and the bias.
ROUNDINGS = 4


def gemm_w8a8_reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_w8a8."""
    return linear(scaled(x, x_scale), scaled(w, w_scale), bias)


def gemm_w8a8_nested_reference(
    x: Tensor, x_scale: Tensor, w_high: Tensor, w_low: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Reference:
    """The arguments of gemm_w8a8_nested, but x in natural order."""
    w = 16 * unpack_nibbles(w_high) + unpack_nibbles(w_low)
    return gemm_w8a8_reference(x, x_scale, w, w_scale, bias)

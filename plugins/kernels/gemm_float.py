"""GEMMs on the floating-point tensor cores: 16 bits, int8 weights (nested ones too) with 16-bit activations, e4m3."""

import triton
import triton.language as tl
from torch import Tensor

from adatsq_trt.packing import unpack_nibbles
from adatsq_trt.plugins.kernels.reference import Reference, linear, scaled
from adatsq_trt.plugins.kernels.tile import row_pointers, store_tile, tile_position


@triton.jit
def _multiply(x, w, tokens, features, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile [BLOCK_N, BLOCK_M] of w xᵀ, float32; w is converted to x's type."""
    x_rows, w_rows = row_pointers(x, tokens, m, k), row_pointers(w, features, n, k)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        right = tl.load(x_rows[None, :] + inner[:, None], mask=(inner < k)[:, None], other=0.0)
        left = tl.load(w_rows[:, None] + inner[None, :], mask=(inner < k)[None, :], other=0.0)
        # Hopper adds e4m3 products with about 14 bits; here their sum goes to float32 after every BLOCK_K.
        acc = tl.dot(left.to(x.dtype.element_ty), right, acc, max_num_imprecise_acc=BLOCK_K)
    return acc


@triton.jit
def gemm_16(
    x,
    w,
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
    """Compute y = x wᵀ + bias.

    Args:
        x: [M, K] in y's type.
        w: [N, K] in y's type.
        bias: [N] in y's type; not read when has_bias is 0.
        y: [M, N] float16 or bfloat16.
        m, n, k: the shape.
        has_bias: 0 or 1.
        BLOCK_M, BLOCK_N, BLOCK_K: the tile.
        GROUP_M: blocks of tokens that run together.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    acc = _multiply(x, w, tokens, features, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K)
    store_tile(acc, bias, y, tokens, features, m, n, has_bias)


@triton.jit
def gemm_w8a16(
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
    """Compute y = x (w · w_scale)ᵀ + bias; codes are exact in 16 bits.

    What differs from gemm_16:

    Args:
        w: [N, K] int8.
        w_scale: [N] float32.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    acc = _multiply(x, w, tokens, features, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K)
    by_feature = tl.load(w_scale + features, mask=features < n, other=0.0)
    store_tile(acc * by_feature[:, None], bias, y, tokens, features, m, n, has_bias)


@triton.jit
def gemm_w8a16_nested(
    x,
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
    """Compute gemm_w8a16 with w = 16 · w_high + w_low.

    What differs from gemm_w8a16:

    Args:
        w_high: [N, K / 2] int8: two codes in [-7, 7] to a byte, the even k in the low nibble.
        w_low: likewise, codes in [-8, 7].
        k: a multiple of 32, which that of any group is.
        BLOCK_K: elements of K at a time, half of them even.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    half = tl.multiple_of(k // 2, 16)
    dtype: tl.constexpr = y.dtype.element_ty
    # Two neighbours are read as one 32-bit word, which is split in registers: even and odd k, as the nibbles are.
    x_rows = row_pointers(x.to(tl.pointer_type(tl.int32)), tokens, m, half)[None, :]
    high_rows, low_rows = row_pointers(w_high, features, n, half), row_pointers(w_low, features, n, half)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, half, BLOCK_K // 2):
        pair = start + tl.arange(0, BLOCK_K // 2)
        left, right = (pair < half)[None, :], (pair < half)[:, None]
        high = tl.load(high_rows[:, None] + pair[None, :], mask=left, other=0)
        low = tl.load(low_rows[:, None] + pair[None, :], mask=left, other=0)
        words = tl.load(x_rows + pair[:, None], mask=right, other=0)
        even, odd = words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        # A nibble shifted to the top of its byte is 16 times its value.
        acc = tl.dot(((high << 4) + ((low << 4) >> 4)).to(dtype), even, acc)
        acc = tl.dot((((high >> 4) << 4) + (low >> 4)).to(dtype), odd, acc)
    by_feature = tl.load(w_scale + features, mask=features < n, other=0.0)
    store_tile(acc * by_feature[:, None], bias, y, tokens, features, m, n, has_bias)


@triton.jit
def gemm_fp8(
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

    What differs from gemm_16:

    Args:
        x: [M, K] float8 e4m3, by quantize_fp8.
        x_scale: [1] float32, static.
        w: [N, K] float8 e4m3.
        w_scale: [N] float32.
    """
    tokens, features = tile_position(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    acc = _multiply(x, w, tokens, features, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K)
    by_feature = tl.load(w_scale + features, mask=features < n, other=0.0) * tl.load(x_scale)
    store_tile(acc * by_feature[:, None], bias, y, tokens, features, m, n, has_bias)


def gemm_16_reference(x: Tensor, w: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_16."""
    return linear(x.double(), w.double(), bias)


def gemm_w8a16_reference(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_w8a16."""
    return linear(x.double(), scaled(w, w_scale), bias)


def gemm_w8a16_nested_reference(
    x: Tensor, w_high: Tensor, w_low: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Reference:
    """The arguments of gemm_w8a16_nested."""
    return gemm_w8a16_reference(x, 16 * unpack_nibbles(w_high) + unpack_nibbles(w_low), w_scale, bias)


def gemm_fp8_reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Reference:
    """The arguments of gemm_fp8."""
    return linear(x.double() * x_scale.double(), scaled(w, w_scale), bias)

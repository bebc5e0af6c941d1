"""Quantization of activations: int8 with a scale per token, e4m3 with a static scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Added to a float32 number of magnitude below 2^22 and taken off again, it rounds to the nearest integer, ties to even.
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
# Smallest scale, so that a token of zeros stays finite: as adatsq_trt.quantizers has it.
_SMALLEST: tl.constexpr = tl.constexpr(1e-12)
_E4M3_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def _load_smoothed(x_row, smooth, inner, k, has_smooth):
    values = tl.load(x_row + inner, mask=inner < k, other=0.0).to(tl.float32)
    return tl.div_rn(values, tl.load(smooth + inner, mask=inner < k * has_smooth, other=1.0))


@triton.jit
def quantize_tokens(x, smooth, q, scale, k, maximum, has_smooth, EVEN_ODD: tl.constexpr, BLOCK_K: tl.constexpr):
    """One token per program: q = round(x / smooth / scale), scale = max |x / smooth| / maximum.

    A token that holds a NaN or an infinity gets the scale NaN, which its whole result then is: nothing hides it.

    Args:
        x: [M, K] float16 or bfloat16.
        smooth: [K] float32; not read when has_smooth is 0.
        q: [M, K] int8. With EVEN_ODD a token's even elements come first, then its odd ones: in this order packed
            weights are multiplied without interleaving their nibbles. K is even then.
        scale: [M] float32.
        k: K.
        maximum: largest code, float32: 127, or 7 for the int4 range.
        has_smooth: 0 or 1.
        EVEN_ODD: order of the codes.
        BLOCK_K: elements at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    x_row, q_row = x + token * k, q + token * k
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, k, BLOCK_K):
        values = _load_smoothed(x_row, smooth, start + tl.arange(0, BLOCK_K), k, has_smooth)
        largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    # The maximum of a block drops NaN. The difference is zero, or NaN where a value is not finite.
    highest = tl.max(largest, axis=0) + tl.sum(largest - largest, axis=0)
    step = tl.maximum(tl.div_rn(highest, maximum), _SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale + token, step)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        values = tl.div_rn(_load_smoothed(x_row, smooth, inner, k, has_smooth), step)
        codes = tl.clamp(values + _ROUND - _ROUND, -maximum, maximum).to(tl.int8)
        if EVEN_ODD:
            even, odd = tl.split(tl.reshape(codes, (BLOCK_K // 2, 2)))
            pair = start // 2 + tl.arange(0, BLOCK_K // 2)
            tl.store(q_row + pair, even, mask=pair < k // 2)
            tl.store(q_row + k // 2 + pair, odd, mask=pair < k // 2)
        else:
            tl.store(q_row + inner, codes, mask=inner < k)


@triton.jit
def quantize_fp8(x, scale, q, k, BLOCK_K: tl.constexpr):
    """One token per program: q = x / scale, rounded to e4m3 and saturating at 448; NaN stays NaN.

    Args:
        x: [M, K] float16 or bfloat16.
        scale: [1] float32, static.
        q: [M, K] float8 e4m3.
        k: K.
        BLOCK_K: elements at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    step = tl.load(scale)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + token * k + inner, mask=inner < k, other=0.0).to(tl.float32)
        kept = tl.clamp(tl.div_rn(values, step), -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(q + token * k + inner, kept.to(tl.float8e4nv), mask=inner < k)


def even_odd(codes: Tensor) -> Tensor:
    """[M, K] with each row's even elements first, then its odd ones."""
    return torch.cat([codes[:, 0::2], codes[:, 1::2]], dim=1)


def quantize_tokens_reference(x: Tensor, smooth: Tensor | None, maximum: float = 127.0) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] in natural order and scales float32 [M]; the same operations, so the same bits."""
    values = x.float() if smooth is None else x.float() / smooth
    step = (values.abs().amax(dim=1) / maximum).clamp(min=_SMALLEST.value)
    return (values / step[:, None]).round().clamp(-maximum, maximum).to(torch.int8), step


def quantize_fp8_reference(x: Tensor, scale: Tensor) -> Tensor:
    """Codes float8_e4m3fn [M, K]; the same bits."""
    return (x.float() / scale).clamp(-_E4M3_MAX.value, _E4M3_MAX.value).to(torch.float8_e4m3fn)

"""Rounding of tokens and dequantization of weights on a GPU, each in one pass over memory.

PyTorch's operations take seven passes for the former, and one at a fifth of the memory's rate for the latter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Added to a float32 number of magnitude below 2^22 and taken off again, it rounds to the nearest integer, ties to even.
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
# As adatsq_trt.quantizers has it.
_SMALLEST: tl.constexpr = tl.constexpr(1e-12)
WIDEST = 32768  # numbers of a token: a program holds all of them in registers
_NUMBERS_PER_WARP, _MOST_WARPS, _MOST_WEIGHTS = 1024, 16, 2048


@triton.jit
def _round_token(x, y, k, maximum, BLOCK_K: tl.constexpr):
    """One token per program: y = step * round(x / step), step = max |x| / maximum.

    Args:
        x: [M, K] floating.
        y: [M, K] floating.
        k: K.
        maximum: largest code, float32.
        BLOCK_K: at least K, a power of two.
    """
    inner = tl.arange(0, BLOCK_K)
    place = tl.program_id(0).to(tl.int64) * k + inner
    values = tl.load(x + place, mask=inner < k, other=0.0).to(tl.float32)
    size = tl.abs(values)
    # The maximum drops NaN. The difference is zero, or NaN where a value is not finite: then the whole token is.
    highest = tl.max(size, axis=0) + tl.sum(size - size, axis=0)
    step = tl.maximum(tl.div_rn(highest, maximum), _SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    rounded = (tl.div_rn(values, step) + _ROUND - _ROUND) * step
    tl.store(y + place, rounded.to(y.dtype.element_ty), mask=inner < k)


def round_tokens(x: Tensor, maximum: float, dtype: torch.dtype) -> Tensor:
    """`fake_quantize_activation` for grids with a scale per token: the same float32 arithmetic.

    Args:
        x: [..., K] floating, K at most `WIDEST`.
        maximum: of the grid.
        dtype: of the result.
    """
    rows = x.contiguous().flatten(0, -2)
    result = torch.empty(rows.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(rows.shape[1])
    warps = min(max(block // _NUMBERS_PER_WARP, 1), _MOST_WARPS)
    _round_token[(len(rows),)](rows, result, rows.shape[1], float(maximum), BLOCK_K=block, num_warps=warps)
    return result.view(x.shape)


@triton.jit
def _scale_codes(codes, scales, y, k, groups, width, BLOCK_K: tl.constexpr):
    """Some weights of one output per program: y = code * scale of its group.

    Args:
        codes: [N, K] int8.
        scales: [N, groups] float32.
        y: [N, K] floating.
        k: K.
        groups: of one output.
        width: of a group.
        BLOCK_K: weights at a time, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(codes + row * k + inner, mask=inner < k, other=0).to(tl.float32)
    step = tl.load(scales + row * groups + inner // width, mask=inner < k, other=0.0)
    tl.store(y + row * k + inner, (values * step).to(y.dtype.element_ty), mask=inner < k)


def scale_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_weight` for integers: the same float32 arithmetic.

    Args:
        codes: int8 [N, K].
        scales: float32 [N, groups]; groups divides K.
        dtype: of the result.
    """
    (n, k), groups = codes.shape, scales.shape[1]
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    block = min(triton.next_power_of_2(k), _MOST_WEIGHTS)
    places = (n, triton.cdiv(k, block))
    _scale_codes[places](codes.contiguous(), scales.contiguous(), result, k, groups, k // groups, BLOCK_K=block)
    return result

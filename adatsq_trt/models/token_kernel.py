"""Rounding of tokens on a GPU in one pass over memory; PyTorch's operations one by one take seven."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Added to a float32 number of magnitude below 2^22 and taken off again, it rounds to the nearest integer, ties to even.
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
# As adatsq_trt.quantize has it.
_SMALLEST: tl.constexpr = tl.constexpr(1e-12)
WIDEST = 32768  # numbers of a token: a program holds all of them in registers
_NUMBERS_PER_WARP, _MOST_WARPS = 1024, 16


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

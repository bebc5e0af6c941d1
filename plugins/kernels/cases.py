"""Every kernel on random operands, beside its reference: what the tests and the GPU script run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from adatsq_trt.packing import pack_nibbles
from adatsq_trt.plugins.kernels import gemm_float, gemm_int4, gemm_int8, quantize
from adatsq_trt.plugins.kernels.reference import Reference
from adatsq_trt.plugins.tiles import Tile

QUANTIZE_BLOCK, QUANTIZE_WARPS = 1024, 4


@dataclass(frozen=True)
class Problem:
    """Matrix multiplication on random operands.

    Attributes:
        m: tokens.
        n: output features.
        k: input features.
        dtype: of x and y.
        has_bias: whether there is one.
        seed: of the random numbers.
        device: of the operands.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    has_bias: bool = True
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """One kernel's operands and what they should give.

    Attributes:
        y: [M, N], NaN until the kernel has run.
        launch: runs the kernel with a tile, which writes and gives y.
        reference: gives the exact result.
        roundings: operations of float32 between a product and the result.
        unit: relative error of one of them on the tensor cores.
    """

    y: Tensor
    launch: Callable[[Tile], Tensor]
    reference: Callable[[], Reference]
    roundings: int
    unit: float = 2.0**-24


def gemm(kernel: object, operands: Sequence[Tensor], bias: Tensor | None, y: Tensor, k: int, tile: Tile) -> Tensor:
    """Launch a GEMM.

    Args:
        kernel: a function in the Triton language.
        operands: those before `bias` in its parameters.
        bias: [N] in y's type.
        y: [M, N], which is written and returned.
        k: K.
        tile: how it is cut.
    """
    m, n = y.shape
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    kernel[grid](  # type: ignore[index]
        *(*operands, y if bias is None else bias, y, m, n, k, int(bias is not None)),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # as ahead of time
    )
    return y


def quantize_tokens(x: Tensor, smooth: Tensor | None, maximum: float, even_odd: bool) -> tuple[Tensor, Tensor]:
    """Launch quantize.quantize_tokens: codes int8 [M, K], scales float32 [M]."""
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32, device=x.device)
    quantize.quantize_tokens[(len(x),)](
        *(x, scale if smooth is None else smooth, q, scale, x.shape[1], maximum, int(smooth is not None)),
        EVEN_ODD=even_odd,
        BLOCK_K=QUANTIZE_BLOCK,
        num_warps=QUANTIZE_WARPS,
        enable_fp_fusion=True,
    )
    return q, scale


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Launch quantize.quantize_fp8: codes float8_e4m3fn [M, K]."""
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    options = {"num_warps": QUANTIZE_WARPS, "enable_fp_fusion": True}
    quantize.quantize_fp8[(len(x),)](x, scale, q, x.shape[1], BLOCK_K=QUANTIZE_BLOCK, **options)
    return q


class _Operands:
    """Random operands of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._random = torch.Generator(problem.device).manual_seed(problem.seed)
        self.x = self.normal(problem.m, problem.k).to(problem.dtype)
        self.bias = self.normal(problem.n).to(problem.dtype) if problem.has_bias else None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self.problem.device)

    def codes(self, bits: int, lowest: int | None = None) -> Tensor:
        """Int8 [N, K] over the whole range of so many bits."""
        highest, shape = 2 ** (bits - 1) - 1, (self.problem.n, self.problem.k)
        low = -highest if lowest is None else lowest
        device = self.problem.device
        return torch.randint(low, highest + 1, shape, generator=self._random, device=device, dtype=torch.int8)

    def scales(self, columns: int = 1) -> Tensor:
        """Float32 [N, columns] between 0.5 and 1.5, [N] for one column."""
        shape = (self.problem.n, columns) if columns > 1 else (self.problem.n,)
        return torch.rand(shape, generator=self._random, device=self.problem.device) + 0.5

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """X as int8 in natural order, with its scales."""
        return quantize.quantize_tokens_reference(self.x, None)

    def launch(self, kernel: object, *operands: Tensor) -> tuple[Tensor, Callable[[Tile], Tensor]]:
        p = self.problem
        y = torch.full((p.m, p.n), torch.nan, dtype=p.dtype, device=p.device)
        return y, lambda tile: gemm(kernel, operands, self.bias, y, p.k, tile)


def _pack(codes: Tensor) -> Tensor:
    return pack_nibbles(codes).view(torch.int8).reshape(len(codes), -1)


def gemm_w8a8(problem: Problem, group: int) -> Case:
    """Int8 by int8."""
    o = _Operands(problem)
    (q, x_scale), w, w_scale = o.tokens, o.codes(8), o.scales()
    return Case(
        *o.launch(gemm_int8.gemm_w8a8, q, x_scale, w, w_scale),
        lambda: gemm_int8.gemm_w8a8_reference(q, x_scale, w, w_scale, o.bias),
        gemm_int8.ROUNDINGS,
    )


def gemm_w8a8_nested(problem: Problem, group: int) -> Case:
    """Int8 by two int4 planes."""
    o = _Operands(problem)
    (q, x_scale), high, low, w_scale = o.tokens, _pack(o.codes(4)), _pack(o.codes(4, -8)), o.scales()
    return Case(
        *o.launch(gemm_int8.gemm_w8a8_nested, quantize.even_odd(q), x_scale, high, low, w_scale),
        lambda: gemm_int8.gemm_w8a8_nested_reference(q, x_scale, high, low, w_scale, o.bias),
        gemm_int8.ROUNDINGS,
    )


def gemm_w4a8(problem: Problem, group: int) -> Case:
    """Int8 by int4 in groups; a group's sum is exact, then it is scaled and added."""
    o = _Operands(problem)
    (q, x_scale), w, w_scale = o.tokens, _pack(o.codes(4, -8)), o.scales(problem.k // group)
    return Case(
        *o.launch(gemm_int4.gemm_w4a8, quantize.even_odd(q), x_scale, w, w_scale),
        lambda: gemm_int4.gemm_w4a8_reference(q, x_scale, w, w_scale, o.bias),
        gemm_int8.ROUNDINGS + problem.k // group,
    )


def gemm_w4a16(problem: Problem, group: int) -> Case:
    """16 bits by int4 in groups."""
    o = _Operands(problem)
    w, w_scale = _pack(o.codes(4, -8)), o.scales(problem.k // group)
    return Case(
        *o.launch(gemm_int4.gemm_w4a16, o.x, w, w_scale),
        lambda: gemm_int4.gemm_w4a16_reference(o.x, w, w_scale, o.bias),
        *_float_sum(problem),
    )


def gemm_w8a16(problem: Problem, group: int) -> Case:
    """16 bits by int8."""
    o = _Operands(problem)
    w, w_scale = o.codes(8), o.scales()
    return Case(
        *o.launch(gemm_float.gemm_w8a16, o.x, w, w_scale),
        lambda: gemm_float.gemm_w8a16_reference(o.x, w, w_scale, o.bias),
        *_float_sum(problem),
    )


def gemm_w8a16_nested(problem: Problem, group: int) -> Case:
    """16 bits by two int4 planes."""
    o = _Operands(problem)
    high, low, w_scale = _pack(o.codes(4)), _pack(o.codes(4, -8)), o.scales()
    return Case(
        *o.launch(gemm_float.gemm_w8a16_nested, o.x, high, low, w_scale),
        lambda: gemm_float.gemm_w8a16_nested_reference(o.x, high, low, w_scale, o.bias),
        *_float_sum(problem),
    )


def gemm_16(problem: Problem, group: int) -> Case:
    """16 bits by 16 bits."""
    o = _Operands(problem)
    w = o.normal(problem.n, problem.k).to(problem.dtype)
    return Case(
        *o.launch(gemm_float.gemm_16, o.x, w),
        lambda: gemm_float.gemm_16_reference(o.x, w, o.bias),
        *_float_sum(problem),
    )


def gemm_fp8(problem: Problem, group: int) -> Case:
    """e4m3 by e4m3."""
    o = _Operands(problem)
    x_scale = (o.x.float().abs().amax() / 448.0).reshape(1)
    q = quantize.quantize_fp8_reference(o.x, x_scale)
    w, w_scale = o.normal(problem.n, problem.k).to(torch.float8_e4m3fn), o.scales()
    # Hopper's tensor cores keep about 14 bits of a sum of e4m3 products (DeepSeek-V3, arXiv 2412.19437, section
    # 3.3.2), which goes to float32 after at most 128 elements: four instructions, and twice that to be safe.
    rounding = (8, 2.0**-13) if o.x.is_cuda else _float_sum(problem)
    return Case(
        *o.launch(gemm_float.gemm_fp8, q, x_scale, w, w_scale),
        lambda: gemm_float.gemm_fp8_reference(q, x_scale, w, w_scale, o.bias),
        *rounding,
    )


def _float_sum(problem: Problem) -> tuple[int, float]:
    """Roundings and their unit where K products, exact in float32, are added in float32 and scaled.

    Tensor cores cut off what float32 would round: twice its unit.
    """
    return problem.k + 4, 2.0**-23


GEMMS: dict[str, Callable[[Problem, int], Case]] = {
    make.__name__: make
    for make in (
        *(gemm_w8a8, gemm_w8a8_nested, gemm_w4a8, gemm_w4a16),
        *(gemm_w8a16, gemm_w8a16_nested, gemm_16, gemm_fp8),
    )
}

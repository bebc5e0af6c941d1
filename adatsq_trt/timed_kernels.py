"""The plugin's kernels by name: which of them run a format, and what a table of their times calls them.

The catalog that compiles them, the benchmark that times them and the search that reads its table take the names from
here. Standard library only, because the GPU script runs beside torch and the Triton language alone.
"""

from __future__ import annotations

from dataclasses import dataclass

NATURAL, EVEN_ODD = "natural", "even_odd"  # orders of K in int8 activations

QUANTIZE_TOKENS, QUANTIZE_FP8 = "quantize_tokens", "quantize_fp8"
GEMM_W8A8, GEMM_W8A8_NESTED, GEMM_W4A8 = "gemm_w8a8", "gemm_w8a8_nested", "gemm_w4a8"
GEMM_W4A16, GEMM_W8A16, GEMM_W8A16_NESTED = "gemm_w4a16", "gemm_w8a16", "gemm_w8a16_nested"
GEMM_16, GEMM_FP8 = "gemm_16", "gemm_fp8"
MATMUL_16 = "torch.matmul bf16"


def quantizer_row(kernel: str, order: str = "") -> str:
    """Name the table's row of a kernel that quantizes activations.

    Args:
        kernel: its name.
        order: of K in its output, where it knows several.
    """
    return f"{kernel} {order.replace('_', '-')}".strip()


def gemm_row(kernel: str, group: int) -> str:
    """Name the table's row of a matrix multiplication.

    Args:
        kernel: its name.
        group: inputs that share a weight scale; 0 where weights have no groups.
    """
    return f"{kernel} {group}" if group else kernel


def layer_row(name: str) -> str:
    """Name in a table for whole layers of a format, which were timed as plans."""
    return f"layer {name}"


@dataclass(frozen=True)
class TimedKernels:
    """Kernels that run a linear layer in one format.

    Attributes:
        gemm: the kernel that multiplies, or PyTorch's function in 16 bits.
        quantizers: rows of the table that quantize its activations; the first that the table has counts.
    """

    gemm: str
    quantizers: tuple[str, ...] = ()


_NATURAL_TOKENS = quantizer_row(QUANTIZE_TOKENS, NATURAL)
# fp8: tables written before its quantizer was timed have `quantize_tokens`, which moves as many bytes and finds a
# maximum besides: a little too much rather than nothing.
TIMED_KERNELS: dict[str, TimedKernels] = {
    "bf16": TimedKernels(MATMUL_16),
    "fp16": TimedKernels(MATMUL_16),
    "fp8": TimedKernels(GEMM_FP8, (quantizer_row(QUANTIZE_FP8), _NATURAL_TOKENS)),
    "w8a8": TimedKernels(GEMM_W8A8, (_NATURAL_TOKENS,)),
    "w4a8": TimedKernels(GEMM_W4A8, (quantizer_row(QUANTIZE_TOKENS, EVEN_ODD),)),
    "w8a16": TimedKernels(GEMM_W8A16),
    "int4wo": TimedKernels(GEMM_W4A16),
}

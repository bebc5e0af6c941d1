"""The kernels as the ahead-of-time compiler and the plugin see them: parameters, variants, targets."""

from __future__ import annotations

from dataclasses import dataclass

from adatsq_trt.timed_kernels import (
    EVEN_ODD,
    GEMM_16,
    GEMM_FP8,
    GEMM_W4A8,
    GEMM_W4A16,
    GEMM_W8A8,
    GEMM_W8A8_NESTED,
    GEMM_W8A16,
    GEMM_W8A16_NESTED,
    NATURAL,
    QUANTIZE_FP8,
    QUANTIZE_TOKENS,
)

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm120")
_FP8_TARGETS = ("sm89", "sm90", "sm120")
DTYPES = ("fp16", "bf16")
GROUPS = (64, 128)

# Largest shared memory of a thread block, bytes: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability", less 1 KiB that the system keeps.
SHARED_BYTES = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm120": 99 << 10}

# "*16" stands for a pointer to the 16-bit type of x and y; the rest is as the Triton language writes it.
_SHAPE = (("m", "i32"), ("n", "i32"), ("k", "i32"), ("has_bias", "i32"))
_END = (("bias", "*16"), ("y", "*16"), *_SHAPE)


@dataclass(frozen=True)
class Kernel:
    """One function in the Triton language.

    Attributes:
        name: of the function.
        module: of `adatsq_trt.plugins.kernels`.
        parameters: name and type of what is passed at a launch, in order.
        groups: group sizes of the weights; (0,) for none.
        orders: orders of K in int8 activations that it reads or writes.
        targets: targets that it is compiled for.
        divisible: integers that the code may take for multiples of 16, so that rows are aligned.
    """

    name: str
    module: str
    parameters: tuple[tuple[str, str], ...]
    groups: tuple[int, ...] = (0,)
    orders: tuple[str, ...] = (NATURAL,)
    targets: tuple[str, ...] = TARGETS
    divisible: tuple[str, ...] = ("n", "k")


_INT8 = (("x", "*i8"), ("x_scale", "*fp32"))
_CODES = (("w", "*i8"), ("w_scale", "*fp32"))
_FP8 = (("x", "*fp8e4nv"), ("x_scale", "*fp32"), ("w", "*fp8e4nv"), ("w_scale", "*fp32"))
_PLANES = (("w_high", "*i8"), ("w_low", "*i8"), ("w_scale", "*fp32"))
_TOKENS = (("x", "*16"), ("smooth", "*fp32"), ("q", "*i8"), ("scale", "*fp32"), ("k", "i32"))

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            QUANTIZE_TOKENS,
            "quantize",
            (*_TOKENS, ("maximum", "fp32"), ("has_smooth", "i32")),
            orders=(NATURAL, EVEN_ODD),
            divisible=("k",),
        ),
        Kernel(
            QUANTIZE_FP8,
            "quantize",
            (("x", "*16"), ("scale", "*fp32"), ("q", "*fp8e4nv"), ("k", "i32")),
            targets=_FP8_TARGETS,
            divisible=("k",),
        ),
        Kernel(GEMM_W8A8, "gemm_int8", (*_INT8, *_CODES, *_END)),
        Kernel(GEMM_W8A8_NESTED, "gemm_int8", (*_INT8, *_PLANES, *_END), orders=(EVEN_ODD,)),
        Kernel(GEMM_W4A8, "gemm_int4", (*_INT8, *_CODES, *_END), groups=GROUPS, orders=(EVEN_ODD,)),
        Kernel(GEMM_W4A16, "gemm_int4", (("x", "*16"), *_CODES, *_END), groups=GROUPS),
        Kernel(GEMM_W8A16, "gemm_float", (("x", "*16"), *_CODES, *_END)),
        Kernel(GEMM_W8A16_NESTED, "gemm_float", (("x", "*16"), *_PLANES, *_END)),
        Kernel(GEMM_16, "gemm_float", (("x", "*16"), ("w", "*16"), *_END)),
        Kernel(GEMM_FP8, "gemm_float", (*_FP8, *_END), targets=_FP8_TARGETS),
    )
}

"""Mends what the Triton language's interpreter computes wrongly in version 3.9.

It keeps bfloat16 and e4m3 numbers as bit patterns, which it truncates instead of rounding (or rounds without the carry
into the exponent), makes from integers without converting them, and multiplies as integers. Here NumPy knows both types
through ml_dtypes. What runs on a GPU is not affected.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_KNOWN = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}


def _numbers(handle: TensorHandle) -> npt.NDArray[np.generic]:
    """The handle's data as what they mean."""
    kind = _KNOWN.get(handle.dtype.scalar)
    return handle.data if kind is None else handle.data.view(kind)


def _convert(_builder: InterpreterBuilder, source: TensorHandle, to: tl.dtype, *_rounding: object) -> TensorHandle:
    kind, stored = _KNOWN.get(to.scalar), interpreter._get_np_dtype(to)
    numbers = _numbers(source)
    data = numbers.astype(stored) if kind is None else numbers.astype(np.float32).astype(kind).view(stored)
    return TensorHandle(data, to.scalar)


def _dot(_builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *_: object) -> TensorHandle:
    kind = acc.data.dtype  # int32 or float32: products are exact in both
    product = np.matmul(_numbers(a).astype(kind), _numbers(b).astype(kind))
    return TensorHandle(product + acc.data, acc.dtype.scalar)


InterpreterBuilder.cast_impl = _convert
InterpreterBuilder.create_fp_to_fp = _convert
InterpreterBuilder.create_dot = _dot

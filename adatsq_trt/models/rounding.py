"""Operands of a fake-quantized layer: its rounded input and its stored weight, in the type that it computes in."""

from __future__ import annotations

import logging
from functools import cache
from subprocess import CalledProcessError

import torch
from torch import Tensor

from adatsq_trt.formats import Element, Format, Granularity, Grid
from adatsq_trt.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation

LOGGER = logging.getLogger(__name__)
# Fewer numbers than this are rounded sooner than a kernel is compiled.
_WORTH_A_KERNEL = 1 << 16


def round_input(x: Tensor, grid: Grid, scale: Tensor | None = None) -> Tensor:
    """`fake_quantize_activation`, in one pass where there is a kernel for it: the same numbers.

    On a GPU that is where every token has its own scale and all of it is kept, on a single processor for static scales
    of 8- and 4-bit floating-point numbers; several processors divide PyTorch's operations among themselves.

    Args:
        x: a layer's input [..., K], float32 or bfloat16.
        grid: of its activations.
        scale: float32 [], as there.
    """
    whole = grid.granularity is Granularity.TOKEN and (scale is None or bool(scale == 1))
    if whole and _in_one_pass(x):
        from adatsq_trt.models.gpu_kernels import WIDEST, round_tokens

        if x.shape[-1] <= WIDEST:
            return round_tokens(x, grid.maximum, computing_type(x.device))
    if scale is not None and grid.element in (Element.E4M3, Element.E2M1) and _on_one_processor(x):
        from adatsq_trt.models.cpu_kernels import round_rows

        return round_rows(x, grid, scale)
    return fake_quantize_activation(x, grid, scale)


def stored_weight(weight: QuantizedWeight, fmt: Format) -> Tensor:
    """`dequantize_weight`, on a GPU in one pass where codes are integers: [N, K]."""
    dtype = computing_type(weight.codes.device)
    if _in_one_pass(weight.codes) and fmt.weight.element is Element.INT:
        from adatsq_trt.models.gpu_kernels import scale_codes

        assert weight.scales is not None, "integers have scales"
        return scale_codes(weight.codes, weight.scales, dtype)
    return dequantize_weight(weight, fmt, dtype)


def computing_type(device: torch.device) -> torch.dtype:
    """Return the type in which matrix products on a device are computed now: float32, or autocast's type."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else torch.float32


def _in_one_pass(tensor: Tensor) -> bool:
    return tensor.is_cuda and _kernels_run(tensor.device)


def _on_one_processor(x: Tensor) -> bool:
    plain = x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() and not x.requires_grad
    return plain and x.numel() >= _WORTH_A_KERNEL and torch.get_num_threads() == 1


@cache
def _kernels_run(device: torch.device) -> bool:
    """Whether the kernels can be compiled: every PyTorch for CUDA on Linux has Triton, which needs a C compiler."""
    try:
        from adatsq_trt.models.gpu_kernels import round_tokens

        round_tokens(torch.ones(1, 1, device=device), 1.0, torch.float32)
    except (ImportError, OSError, RuntimeError, CalledProcessError) as error:
        LOGGER.warning("the search takes longer: Triton's kernels do not run here (%s)", " ".join(str(error).split()))
        return False
    return True

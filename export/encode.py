"""Quantized weights as ONNX stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx_ir import DataType
from torch import Tensor

from adatsq_trt.export.weight_store import ExternalData, StoredTensor
from adatsq_trt.formats import Element, Format, Granularity, Grid
from adatsq_trt.packing import pack_nibbles
from adatsq_trt.quantizers import QuantizedWeight

_PLAIN = {Element.FP32: DataType.FLOAT, Element.BF16: DataType.BFLOAT16, Element.FP16: DataType.FLOAT16}
TORCH_TYPES = {
    DataType.FLOAT: torch.float32,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT16: torch.float16,
    DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class EncodedWeight:
    """A layer's weight in one format.

    Attributes:
        codes: [N, K] in the grid's ONNX type.
        scales: base type, [N] per channel or [N, K / group]; e4m3 [N, K / 16] for e2m1; None for plain formats.
        global_scale: e2m1's second-level scale.
    """

    codes: StoredTensor
    scales: StoredTensor | None = None
    global_scale: float | None = None


def element_type(grid: Grid) -> DataType:
    """The ONNX type of a grid's elements."""
    if grid.element is Element.INT:
        return DataType.INT4 if grid.bits <= 4 else DataType.INT8
    if grid.is_float:
        return _PLAIN[grid.element]
    return {Element.E4M3: DataType.FLOAT8E4M3FN, Element.E2M1: DataType.FLOAT4E2M1}[grid.element]


def encode_weight(weight: QuantizedWeight, fmt: Format, base: DataType, store: ExternalData) -> EncodedWeight:
    """Store a weight's codes and scales.

    Args:
        weight: codes [N, K] and scales.
        fmt: the weight's format.
        base: type of the scales; they have eight significant bits, so every base type holds them exactly.
        store: receives the bytes.
    """
    grid, kind = fmt.weight, element_type(fmt.weight)
    shape = tuple(weight.codes.shape)
    if kind in (DataType.INT4, DataType.FLOAT4E2M1):
        codes = store.add(tensor_bytes(pack_nibbles(weight.codes)), kind, shape)
    else:
        codes = store.add(tensor_bytes(weight.codes), kind, shape)
    if weight.scales is None:
        return EncodedWeight(codes)
    if weight.global_scale is not None:
        block_scales = store.add(tensor_bytes(weight.scales), DataType.FLOAT8E4M3FN, tuple(weight.scales.shape))
        return EncodedWeight(codes, block_scales, float(weight.global_scale))
    scales = weight.scales[:, 0] if grid.granularity is Granularity.CHANNEL else weight.scales
    return EncodedWeight(codes, store.add(tensor_bytes(scales.to(TORCH_TYPES[base])), base, tuple(scales.shape)))


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's memory, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

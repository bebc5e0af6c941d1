"""Operands of a layer's plugin node, as `plugins/library` wants them: names, types and bytes of its weights.

The names and their order are the library's (`plugins/library/src/layer.h`); `docs/plugin.md` has the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from onnx_ir import DataType
from torch import Tensor

from adatsq_trt.errors import MismatchError, UnsupportedFormatError
from adatsq_trt.formats import FORMATS, GROUP, PLUGIN_FORMATS, Granularity, Grid, format_named
from adatsq_trt.packing import join_planes, pack_nibbles, split_planes
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.transforms import LayerTransform

ALIGNMENT = 16  # of N and K: rows of the kernels' operands are read in 16-byte pieces
FOUR_BIT_GRID, EIGHT_BIT_GRID = FORMATS["w4a8"].weight, FORMATS["w8a8"].weight
_PLAIN_FORMATS = ("fp16", "bf16")


@dataclass(frozen=True)
class Operand:
    """One weight input of a node.

    Attributes:
        content: in memory as the kernels read it; int4 is packed two to a byte.
        dtype: as the graph declares it.
    """

    content: Tensor
    dtype: DataType


def require_plugin_formats(formats: Collection[str]) -> None:
    """Refuse formats that one plugin graph cannot hold.

    Args:
        formats: names of those of the policy.

    Raises:
        UnsupportedFormatError: a format without a kernel, or both 16-bit formats.
    """
    unknown = sorted(set(formats) - PLUGIN_FORMATS)
    if unknown:
        raise UnsupportedFormatError(
            f"the plugin has no kernel for {', '.join(unknown)}; choose among {', '.join(sorted(PLUGIN_FORMATS))} with "
            "--formats, or another --layout"
        )
    if set(formats) >= set(_PLAIN_FORMATS):
        raise UnsupportedFormatError(
            "layout 'plugin': got the formats fp16 and bf16, expected one of them, since all activations of its graph "
            "have one type; leave one out of --formats"
        )


def require_plugin_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse layers that the kernels cannot hold.

    Args:
        shapes: module path → [N, K].

    Raises:
        UnsupportedFormatError: names the layer.
    """
    for layer, (rows, inputs) in shapes.items():
        if rows % ALIGNMENT or inputs % ALIGNMENT:
            raise UnsupportedFormatError(
                f"layer '{layer}': got {inputs} inputs and {rows} outputs, expected multiples of {ALIGNMENT}, which "
                "the plugin's kernels need; choose another --layout"
            )


def plugin_operands(layer: str, weights: Mapping[str, QuantizedWeight]) -> dict[str, Operand]:
    """The weight inputs of a node, by name, each once however many formats read it.

    Args:
        layer: module path, for messages.
        weights: format → the layer's weight in it, for every format that the policy gives to the layer.

    Raises:
        MismatchError: two formats of the layer that share a grid have different weights.
    """
    operands: dict[str, Operand] = {}
    narrow, wide = (_of_grid(layer, weights, grid) for grid in (FOUR_BIT_GRID, EIGHT_BIT_GRID))
    if narrow is not None:
        operands["w4"] = Operand(_packed(narrow.codes), DataType.INT8)
        operands["w4_scale"] = Operand(_scales(narrow), DataType.FLOAT)
    if wide is not None:
        if narrow is not None and is_nested(wide, narrow):
            operands["lo"] = Operand(_packed(split_planes(wide.codes)[1]), DataType.INT8)
        else:
            operands["w8"] = Operand(wide.codes, DataType.INT8)
        operands["w8_scale"] = Operand(_scales(wide)[:, 0], DataType.FLOAT)
    if "fp8" in weights:
        operands["w_fp8"] = Operand(weights["fp8"].codes, DataType.FLOAT8E4M3FN)
        operands["w_fp8_scale"] = Operand(_scales(weights["fp8"])[:, 0], DataType.FLOAT)
    for name in _PLAIN_FORMATS:
        if name in weights:
            plain = DataType.FLOAT16 if name == "fp16" else DataType.BFLOAT16
            operands["w16"] = Operand(weights[name].codes, plain)
    return operands


def fused_smoothing(transform: LayerTransform, formats: Collection[str]) -> Operand | None:
    """Divisors that a node applies while it quantizes each token; None where they are not the whole transform.

    Args:
        transform: of the layer.
        formats: the layer's in all assignments: each has to quantize tokens, since other kernels read x as it is.
    """
    divisor, given = transform.input_map.divisor, transform.input_map
    by_token = all(format_named(name).activation.granularity is Granularity.TOKEN for name in formats)
    if divisor is None or given.signs is not None or transform.branch is not None or not by_token:
        return None
    return Operand(divisor, DataType.FLOAT)


def _of_grid(layer: str, weights: Mapping[str, QuantizedWeight], grid: Grid) -> QuantizedWeight | None:
    """The one weight that all formats of a grid share; None where there is no such format."""
    names = [name for name in weights if format_named(name).weight == grid]
    for other in names[1:]:
        pairs = ((getattr(weights[names[0]], part), getattr(weights[other], part)) for part in ("codes", "scales"))
        if not all(torch.equal(one, another) for one, another in pairs):
            raise MismatchError(
                f"layer '{layer}': {names[0]} and {other} have different weights, though they share a grid; run "
                "'adatsq-trt quantize' again"
            )
    return weights[names[0]] if names else None


def is_nested(wide: QuantizedWeight, narrow: QuantizedWeight) -> bool:
    """Whether the 4-bit codes are the high plane of the 8-bit ones."""
    high, low = split_planes(wide.codes)
    return torch.equal(high, narrow.codes) and torch.equal(join_planes(high, low), wide.codes)


def group_size(weights: Mapping[str, QuantizedWeight]) -> int:
    """Inputs that share a 4-bit scale; the library's default where there is none."""
    for name, weight in weights.items():
        if format_named(name).weight == FOUR_BIT_GRID:
            return weight.codes.shape[1] // _scales(weight).shape[1]
    return GROUP


def _packed(codes: Tensor) -> Tensor:
    return pack_nibbles(codes).reshape(len(codes), -1)


def _scales(weight: QuantizedWeight) -> Tensor:
    assert weight.scales is not None
    return weight.scales

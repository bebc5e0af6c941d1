"""Bytes and time of SVDQuant, which is no policy of a run: its kernels fuse what stands beside a product."""

from __future__ import annotations

from collections.abc import Sequence

from adatsq_trt.calibration.transforms.low_rank import rank_of
from adatsq_trt.costs import Costs
from adatsq_trt.formats import Element, Format
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import Card

_HALF = 2  # bytes of 16 bits
# 10^12 operations per second with 4-bit integers, of which the search's cards know nothing: no target multiplies them
# in graphs. From where the other rates of this card are (waredb.com/processor/nvidia-geforce-rtx-4090).
INT4_TOPS = {"rtx-4090": 1321.2}


def svdquant_costs(
    fmt: Format, shapes: Sequence[LayerShape], inputs: Sequence[LayerShape], card: Card, steps: int, rest_ms: float
) -> Costs:
    """SVDQuant as its authors run it: the branch's products in the kernels of rounding and of the layer's product.

    So its operations and its matrices count, and no other reading or writing of what it multiplies. A roofline.

    Args:
        fmt: of weights and inputs.
        shapes: of all layers.
        inputs: of one layer for each distinct input, which is divided once.
        card: with a rate for the format.
        steps: of the loop.
        rest_ms: of all that is not quantized, in all steps.
    """
    operations = sum(s.in_features * s.out_features * s.tokens for s in shapes)
    size = sum(_layer_bytes(fmt, shape) for shape in shapes) + sum(_HALF * s.in_features for s in inputs)
    bits = sum(fmt.moved_activation_bits(s.in_features) * s.in_features * s.out_features * s.tokens for s in shapes)
    ms = steps * sum(_layer_ms(fmt, shape, card) for shape in shapes)
    return Costs(resident_bytes=round(size), activation_bits=bits / operations, ms=ms + rest_ms)


def _layer_bytes(fmt: Format, shape: LayerShape) -> float:
    weights = fmt.stored_weight_bits(shape.in_features) / 8 * shape.in_features * shape.out_features
    return weights + _HALF * _rank(shape) * (shape.in_features + shape.out_features)


def _layer_ms(fmt: Format, shape: LayerShape, card: Card) -> float:
    integers = fmt.activation.element is Element.INT
    rate = INT4_TOPS[card.name] if integers else card.tops[fmt.activation.element]
    sides = shape.in_features + shape.out_features
    computed = 2.0 * shape.tokens * shape.in_features * shape.out_features / rate
    computed += 2.0 * shape.tokens * _rank(shape) * sides / card.tops[Element.BF16]
    given = fmt.moved_activation_bits(shape.in_features) / 8 * shape.tokens * shape.in_features
    moved = _layer_bytes(fmt, shape) + given + _HALF * shape.tokens * shape.out_features
    return max(computed / 1e9, moved / (card.memory_gbs * 1e6))


def _rank(shape: LayerShape) -> int:
    return rank_of(shape.in_features, shape.out_features)

"""Time of a step: from a roofline of a card's published rates, or from times that were measured on it.

Roofline: a layer takes the longer of its operations at the rate of its number format and its bytes (weights, input,
output in 16 bits) at the memory's rate. Nothing overlaps, nothing is fused, and no card reaches its published rates:
the result is a lower bound that ranks formats, and everything that shows it calls it a roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, model_validator

from adatsq_trt.errors import UnknownNameError, UnsupportedFormatError
from adatsq_trt.files import parse_json_model, read_json_model
from adatsq_trt.formats import FORMATS, Element, Format, format_named
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.candidates import Array
from adatsq_trt.timed_kernels import TIMED_KERNELS, gemm_row, layer_row

_ADVICE = "write it with 'adatsq-trt benchmark bundle --layer-times' or 'adatsq-trt benchmark kernels'"
_OUTPUT_BYTES = 2


@dataclass(frozen=True)
class Card:
    """Published rates of a card: dense matrix products, accumulated in 32 bits.

    Attributes:
        name: as on the command line.
        title: as its vendor calls it.
        memory_gbs: bandwidth in GB/s.
        tops: element of the layer's input → 10^12 operations per second, an addition and a multiplication each.
    """

    name: str
    title: str
    memory_gbs: float
    tops: dict[Element, float]


def _card(name: str, title: str, memory: float, half: float, **others: float) -> Card:
    names = {"int8": Element.INT, "fp8": Element.E4M3, "fp4": Element.E2M1}
    tops = {Element.BF16: half, Element.FP16: half} | {names[other]: rate for other, rate in others.items()}
    return Card(name, title, memory, tops)


# NVIDIA's figures without sparsity, half of those with it. Cards that could not be checked are left out.
#   a100      312 TFLOPS bf16, 624 TOPS int8, 2,039 GB/s: glennklockwood.com/garden/processors/A100, which cites the
#             data sheet nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
#   rtx-4090  with 32-bit accumulation: 165.2 bf16, 330.3 fp8, 660.6 TOPS int8, 1,008 GB/s
#             (waredb.com/processor/nvidia-geforce-rtx-4090; not seen in a document of NVIDIA's)
#   l40s      362.05 bf16, 733 fp8, 864 GB/s: the data sheet's table, as in mullet.se/product.html?product_id=355414,
#             without an int8 rate
#   a40       149.7 bf16, 299.3 TOPS int8, 696 GB/s: the data sheet's table, as in ecer.com/corp/details-uuuedqa-p1bsay9
#   h100      3.35 TB/s, fp8 as the H200 (lzwjava.github.io/nvidia-h200-gpu-specs-en), whose die it shares
#   h200      989 bf16, 1,979 fp8, 4.8 TB/s (itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html); 3.96 POPS
#             int8 with sparsity (hmc-tech.com/gpu/nvidia-h100-vs-nvidia-h200-sxm-vs-nvidia-gb200)
#   rtx-5090  1,792 GB/s, and with sparsity 838 fp16, 1,676 fp8 and 3,352 fp4
#             (spheron.network/blog/nvidia-rtx-5090-specs; not seen in a document of NVIDIA's). That is with 16-bit
#             accumulation; with 32 bits fp16 and fp8 have half, as on the rtx-4090, whose int8 is twice its fp8 too
CARDS = {
    card.name: card
    for card in (
        _card("a100", "NVIDIA A100 80GB SXM", 2039, 312, int8=624),
        _card("a40", "NVIDIA A40", 696, 149.7, int8=299.3),
        _card("rtx-4090", "NVIDIA GeForce RTX 4090", 1008, 165.2, int8=660.6, fp8=330.3),
        _card("l40s", "NVIDIA L40S", 864, 362, fp8=733),
        _card("h100", "NVIDIA H100 SXM", 3350, 989, int8=1979, fp8=1979),
        _card("h200", "NVIDIA H200 SXM", 4800, 989, int8=1979, fp8=1979),
        _card("rtx-5090", "NVIDIA GeForce RTX 5090", 1792, 209.5, int8=838, fp8=419, fp4=1676),
    )
}

# Where times are told for a target when no card is named.
TARGET_CARDS = {"sm80": "a100", "sm86": "a40", "sm89": "rtx-4090", "sm90": "h100", "sm120": "rtx-5090"}


class _Timing(BaseModel):
    """One row of a measured table; what else is there is not needed."""

    what: str
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    median_ms: FiniteFloat = Field(gt=0)


class TimeTable(BaseModel):
    """Times that `adatsq-trt benchmark kernels` measures, and of whole layers `benchmark bundle --layer-times`."""

    schema_version: Literal[1] = 1
    measured: Literal[True]
    card: str
    timings: tuple[_Timing, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> TimeTable:
        first: dict[tuple[str, int, int, int], float] = {}
        for t in self.timings:
            if first.setdefault((t.what, t.m, t.n, t.k), t.median_ms) != t.median_ms:
                raise ValueError(f"timings has two times of {t.what} with m {t.m}, n {t.n}, k {t.k}")
        return self

    def rows(self, what: str) -> list[_Timing]:
        """Those of exactly this name."""
        return [timing for timing in self.timings if timing.what == what]


@dataclass(frozen=True)
class TimeModel:
    """Where times come from: a card's published rates or a measured table.

    Attributes:
        card: for a roofline.
        table: measured times.
    """

    card: Card | None = None
    table: TimeTable | None = None

    @property
    def source(self) -> str:
        """Source of the times, as every output names it."""
        if self.table is not None:
            return f"measured on {self.table.card}"
        assert self.card is not None
        return f"roofline of {self.card.title}'s published rates"

    def layer_ms(self, fmt: Format, shape: LayerShape) -> float:
        """Milliseconds of one layer in one step of one sample.

        Raises:
            UnsupportedFormatError: the card has no rate, or the table no time, for this format.
        """
        if self.table is not None:
            return _measured_ms(self.table, fmt, shape)
        assert self.card is not None
        rate = _rate(self.card, fmt)
        weights = fmt.stored_weight_bits(shape.in_features) / 8 * shape.in_features * shape.out_features
        inputs = fmt.moved_activation_bits(shape.in_features) / 8 * shape.tokens * shape.in_features
        moved = weights + inputs + _OUTPUT_BYTES * shape.tokens * shape.out_features
        return max(_operations(shape) / (rate * 1e9), moved / (self.card.memory_gbs * 1e6))

    def require(self, formats: Sequence[Format]) -> None:
        """Refuse formats whose time nobody knows, before anything runs.

        Raises:
            UnsupportedFormatError: the card has no rate, or the table no time, for one of them.
        """
        for fmt in formats:
            if self.table is not None:
                _measured_rows(self.table, fmt)
            elif self.card is not None:
                _rate(self.card, fmt)

    def knows(self, formats: Sequence[Format]) -> bool:
        """Whether there is a time for each of them."""
        try:
            self.require(formats)
        except UnsupportedFormatError:
            return False
        return True

    def rest_ms(self, operations: float) -> float:
        """Milliseconds of everything that is not quantized, in one step: 0 where only layers were measured.

        Args:
            operations: additions and multiplications, in 16 bits.
        """
        return 0.0 if self.card is None else operations / (self.card.tops[Element.BF16] * 1e9)

    def product_ms(self, rows: int, width: int, outputs: int) -> float:
        """Milliseconds of a product [rows, width] · [width, outputs] in 16 bits.

        Raises:
            UnsupportedFormatError: the table has no time for such products.
        """
        return self.layer_ms(format_named("bf16"), LayerShape("", width, outputs, rows))

    def pointwise_ms(self, numbers: int) -> float:
        """Milliseconds to read and write so many numbers of 16 bits: 0 where only layers were measured."""
        return 0.0 if self.card is None else 2 * numbers / (self.card.memory_gbs * 1e6)

    def table_of(self, formats: Sequence[Format], shapes: Sequence[LayerShape]) -> Array:
        """`layer_ms` of all, float64 [formats, layers]."""
        return np.array([[self.layer_ms(fmt, shape) for shape in shapes] for fmt in formats])


def time_model(gpu: str) -> tuple[TimeModel, str]:
    """The model for a card's name or a file of measured times, and its text for the settings.

    Raises:
        UnknownNameError: no such card.
        UserError: the file cannot be read.
    """
    if gpu in CARDS:
        return TimeModel(card=CARDS[gpu]), gpu
    file = Path(gpu)
    if not file.suffix and not file.exists():
        raise UnknownNameError("card", gpu, CARDS)
    table = read_json_model(file, TimeTable, _ADVICE)
    return TimeModel(table=table), table.model_dump_json()


def stored_time_model(text: str) -> TimeModel:
    """The model that `time_model` gave this text for."""
    if text in CARDS:
        return TimeModel(card=CARDS[text])
    return TimeModel(table=parse_json_model(text, "settings.json", TimeTable))


def _operations(shape: LayerShape) -> float:
    return 2.0 * shape.tokens * shape.in_features * shape.out_features


def _rate(card: Card, fmt: Format) -> float:
    """10^12 operations per second of a format on a card."""
    # Weight-only formats compute in 16 bits; simulated grids would need units that no card has.
    rate = card.tops.get(fmt.activation.element)
    if rate is None or (fmt.activation.element is Element.INT and fmt.activation.bits != 8):
        raise UnsupportedFormatError(
            f"--gpu: the roofline of {card.title} has no rate for format '{fmt.name}'; leave it out of "
            "--formats, or choose another card with --gpu"
        )
    return rate


_Rows = tuple[list[_Timing], list[_Timing]]
_TWINS = {"bf16": ("fp16",), "fp16": ("bf16",)}


def _timed(table: TimeTable, fmt: Format) -> _Rows | None:
    """A format's multiplications, and what quantizes its activations before (none where nothing does).

    Whole layers, where the table has them, are both in one. The two types of 16 bits take the same time.
    """
    for name in (fmt.name, *_TWINS.get(fmt.name, ())):
        if layers := table.rows(layer_row(name)):
            return layers, []
    kernels = TIMED_KERNELS.get(fmt.name)
    if kernels is None:
        return None
    gemms = table.rows(gemm_row(kernels.gemm, fmt.weight.group_size))
    quantizers = next((rows for what in kernels.quantizers if (rows := table.rows(what))), [])
    return (gemms, quantizers) if gemms and bool(quantizers) == bool(kernels.quantizers) else None


def _measured_rows(table: TimeTable, fmt: Format) -> _Rows:
    rows = _timed(table, fmt)
    if rows is None:
        names = dict.fromkeys([*TIMED_KERNELS, *FORMATS])
        known = ", ".join(name for name in names if _timed(table, format_named(name))) or "none"
        raise UnsupportedFormatError(
            f"--gpu: the table measured on {table.card} has no time for format '{fmt.name}', its formats are "
            f"{known}; leave it out of --formats, or name a card with --gpu"
        )
    return rows


def _measured_ms(table: TimeTable, fmt: Format, shape: LayerShape) -> float:
    """Times of the measured shapes that are nearest in the logarithm, scaled by what is done.

    A multiplication by its operations, a quantizer by the elements of the layer's input.
    """
    gemms, quantizers = _measured_rows(table, fmt)
    m, n, k = shape.tokens, shape.out_features, shape.in_features

    def distance(*pairs: tuple[int, int]) -> float:
        return sum(abs(log(a / b)) for a, b in pairs)

    gemm = min(gemms, key=lambda t: distance((t.m, m), (t.n, n), (t.k, k)))
    total = gemm.median_ms * (m * n * k) / (gemm.m * gemm.n * gemm.k)
    if quantizers:
        quantizer = min(quantizers, key=lambda t: distance((t.m, m), (t.k, k)))
        total += quantizer.median_ms * (m * k) / (quantizer.m * quantizer.k)
    return total

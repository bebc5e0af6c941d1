"""Budgets on the command line: in bits, bytes and milliseconds, alone or together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from adatsq_trt.errors import UserError
from adatsq_trt.formats import default_budget, resolve_formats

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?) *([kMG]?B?)", re.IGNORECASE)
_UNITS = {"": 1.0, "b": 1.0, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9}


@dataclass(frozen=True)
class BudgetRequest:
    """The options; None stands for "no such budget".

    Attributes:
        bits: --budget-bits.
        bytes: --budget-bytes.
        ms: --budget-ms.
        gpu: --gpu.
    """

    bits: float | None = None
    bytes: str | None = None
    ms: float | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class BudgetChoice:
    """What was understood.

    Attributes:
        bits: largest mean of (weight bits + activation bits) / 2, None for no limit.
        bytes: most bytes of quantized weights, likewise.
        ms: most milliseconds per sample, likewise.
        times: text of the `TimeModel`.
    """

    bits: float | None
    bytes: float | None = None
    ms: float | None = None
    times: str | None = None


def choose_budgets(request: BudgetRequest, format_set: str) -> BudgetChoice:
    """Fill in the default: without any budget the format set's, in bits.

    Raises:
        UserError: a number that is none, a size of no known unit, milliseconds of no card, an unknown card, or a format
            whose time there nobody knows.
    """
    require_finite("--budget-bits", request.bits)
    require_finite("--budget-ms", request.ms)
    size = None if request.bytes is None else parse_bytes(request.bytes)
    if request.ms is None and request.gpu is None:
        bits = default_budget(format_set) if request.bits is None and size is None else request.bits
        return BudgetChoice(bits, size)
    from adatsq_trt.search.costs import require_one_unit, time_model

    require_one_unit(request.gpu, request.ms)
    assert request.gpu is not None
    model, times = time_model(request.gpu)
    model.require(resolve_formats(format_set))
    return BudgetChoice(request.bits, size, request.ms, times)


def parse_bytes(text: str, option: str = "--budget-bytes") -> float:
    """A number of bytes: "800000", "800kB", "6.5 GB"; a kB is 1,000 bytes.

    Args:
        text: what the user wrote.
        option: where.

    Raises:
        UserError: it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{option} '{text}': expected a size such as 800000, 800kB, 12.5MB or 6GB")
    return float(match[1]) * _UNITS[match[2].lower()]


def require_finite(option: str, value: float | None) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: names the option.
    """
    if value is not None and not math.isfinite(value):
        raise UserError(f"{option}: got {value}, expected a finite number; pass such a number or leave the option out")

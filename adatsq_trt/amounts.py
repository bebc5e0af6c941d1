"""Sizes, speeds and lists as users write them: 300kB, 0.3x, 12ms, 1.8x, 1,0.75,0.5."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from adatsq_trt.errors import UserError

_NUMBER = r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)"
_SIZE = re.compile(rf"{_NUMBER} *([kMG]?B?)", re.IGNORECASE)
_TIMES = re.compile(rf"{_NUMBER} *x", re.IGNORECASE)
_MILLISECONDS = re.compile(rf"{_NUMBER} *ms", re.IGNORECASE)
_UNITS = {"": 1.0, "b": 1.0, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9}


@dataclass(frozen=True)
class Amount:
    """A limit, by itself or beside 16 bits.

    Attributes:
        value: bytes or milliseconds; where relative, a part of the 16-bit bytes or how many times as fast.
        relative: to the model in 16 bits.
    """

    value: float
    relative: bool


def parse_bytes(size: float | str, option: str) -> float:
    """A number of bytes: 800000, "800kB", "6.5 GB"; a kB is 1,000 bytes.

    Args:
        size: the user's number or text.
        option: name of the option, for messages.

    Raises:
        UserError: not a number of bytes.
    """
    if not isinstance(size, str):
        if isinstance(size, bool) or not math.isfinite(size) or size < 0:
            raise UserError(f"{option} {size}: expected a number of bytes, or a text such as 6GB")
        return float(size)
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise UserError(f"{option} '{size}': expected a size such as 800000, 800kB, 12.5MB or 6GB")
    return float(match[1]) * _UNITS[match[2].lower()]


def parse_size(size: float | str, option: str) -> Amount:
    """Bytes as `parse_bytes` reads them, or a part of the bytes in 16 bits: "0.3x".

    Raises:
        UserError: it is neither.
    """
    match = _TIMES.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        return Amount(_positive(match[1], size, option), relative=True)
    try:
        return Amount(parse_bytes(size, option), relative=False)
    except UserError as error:
        raise UserError(f"{error}; or a part of the 16-bit model's, such as 0.3x") from None


def parse_speed(speed: str, option: str) -> Amount:
    """Milliseconds: "12ms"; or how many times as fast as 16 bits: "1.8x".

    Raises:
        UserError: it is neither; a number alone could be both.
    """
    for pattern, relative in ((_TIMES, True), (_MILLISECONDS, False)):
        match = pattern.fullmatch(speed.strip()) if isinstance(speed, str) else None
        if match is not None:
            return Amount(_positive(match[1], speed, option), relative)
    raise UserError(f"{option} '{speed}': expected a speed against 16 bits such as 1.8x, or milliseconds such as 12ms")


def parse_falling(numbers: str | Iterable[float], option: str, most: float) -> tuple[float, ...]:
    """Numbers that fall towards 0: "1,0.75,0.5", or these themselves.

    Args:
        numbers: the user's text or numbers.
        option: name of the option, for messages.
        most: that the first may be.

    Raises:
        UserError: not such numbers.
    """
    try:
        values = tuple(map(float, numbers.split(",") if isinstance(numbers, str) else numbers))
    except (TypeError, ValueError):
        values = ()
    falls = all(value > following for value, following in pairwise((*values, 0.0)))  # NaN does not
    if not values or not falls or values[0] > most:
        raise UserError(
            f"{option} '{numbers}': expected numbers that fall, at most {most:g} and all above 0, which ends the loop "
            f"by itself; such as {most:g},{most * 3 / 4:g},{most / 2:g}"
        )
    return values


def _positive(number: str, text: float | str, option: str) -> float:
    value = float(number)
    if not 0 < value < math.inf:
        raise UserError(f"{option} '{text}': got {value:g}, expected a finite number above 0")
    return value

"""Numbers as people read them."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def power_of_ten(exponent: int) -> str:
    """10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def scientific(value: float) -> str:
    """Three significant digits, in one line: 1.32 × 10⁻³."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{power_of_ten(int(exponent))}"


def ratio(value: float) -> str:
    """A factor: 0.27 ×; what is there is never called 0."""
    return "< 0.01 ×" if 0 < value < 0.005 else f"{value:.2f} ×"


def share(part: float) -> str:
    """A part of the whole in per cent: 49 %; what is there is never called 0 %."""
    return "< 1 %" if 0 < part < 0.005 else f"{part:.0%}".replace("%", " %")


def size(count: int) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds: 4.2 s, 3 min 12 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

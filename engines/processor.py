"""The processor of this machine."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# What decides how fast integer products are.
INTEGER_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@cache
def processor() -> tuple[str, frozenset[str]]:
    """Name and flags of the processor, as Linux tells them; no flags where the system is another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())

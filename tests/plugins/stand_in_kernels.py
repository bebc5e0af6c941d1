"""A kernels folder as `adatsq-trt build plugins` makes it, with text in place of machine code.

The recording driver of the harness (plugins/library/test) reads this text: it says which arguments a launch has.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

A8 = ("q", "x_scale", "w", "w_scale")
A16 = ("x", "w", "w_scale")
GEMMS = {
    "gemm_w8a8": (A8, (0,)),
    "gemm_w4a8": (A8, (64, 128)),
    "gemm_w8a8_nested": (("q", "x_scale", "w", "lo", "w_scale"), (0,)),
    "gemm_w8a16": (A16, (0,)),
    "gemm_w4a16": (A16, (64, 128)),
    "gemm_16": (("x", "w"), (0,)),
    "gemm_fp8": (("x", "x_scale", "w", "w_scale"), (0,)),
}
SIZES = ("m", "n", "k")
TRAILING = ("global_scratch", "profile_scratch")
# (block_m, num_warps, shared_bytes): the second needs more shared memory than a kernel gets without asking.
TILES = ((16, 4, 8192), (64, 8, 65536))
TARGETS = ("sm80", "sm90")


def entries() -> Iterator[dict[str, Any]]:
    for target, dtype in product(TARGETS, ("fp16", "bf16")):
        for smoothing in (False, True):
            pointers = ("x", *(("smoothing",) if smoothing else ()), "q", "x_scale")
            yield _entry("quantize_tokens", target, dtype, pointers, has_smoothing=smoothing, tile=(4, 4, 0))
        for (name, (pointers, groups)), has_bias, tile in product(GEMMS.items(), (False, True), TILES):
            if name == "gemm_fp8" and target == "sm80":
                continue
            for group in groups:
                operands = (*pointers, *(("bias",) if has_bias else ()), "y")
                yield _entry(name, target, dtype, operands, group=group, has_bias=has_bias, tile=tile)


def _entry(
    kernel: str,
    target: str,
    dtype: str,
    pointers: tuple[str, ...],
    tile: tuple[int, int, int],
    group: int = 0,
    has_bias: bool = False,
    has_smoothing: bool = False,
) -> dict[str, Any]:
    block_m, num_warps, shared_bytes = tile
    flags = ("_bias" if has_bias else "") + ("_smoothing" if has_smoothing else "")
    symbol = f"{kernel}_{target}_{dtype}_g{group}_m{block_m}{flags}"
    names = [*((p, "pointer") for p in pointers), *((s, "int32") for s in SIZES), *((t, "pointer") for t in TRAILING)]
    return {
        "kernel": kernel, "target": target, "dtype": dtype, "group": group, "has_bias": has_bias,
        "has_smoothing": has_smoothing, "block_m": block_m, "block_n": 64, "block_k": 64, "group_m": 8,
        "num_warps": num_warps, "num_stages": 3, "shared_bytes": shared_bytes, "registers": 32, "spill_bytes": 0,
        "symbol": symbol, "file": f"{symbol}.cubin",
        "parameters": [{"name": name, "type": kind} for name, kind in names],
        "divisible_by_16": ["k"] if kernel == "gemm_w8a8" and block_m == 64 else [],
    }  # fmt: skip


def write_kernels(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kernels = list(entries())
    for kernel in kernels:
        parameters = " ".join(f"{p['name']}:{p['type']}" for p in kernel["parameters"])
        cubin = f"stand-in {kernel['symbol']} {parameters}".encode()
        (folder / kernel["file"]).write_bytes(cubin)
        kernel["sha256"] = hashlib.sha256(cubin).hexdigest()
    (folder / "kernels.json").write_text(json.dumps({"schema_version": 1, "kernels": kernels}))

"""Stand-in kernels: a folder as `adatsq-trt build plugins` makes it, with text in place of machine code.

The recording driver of the harness (plugins/library/test) reads this text: it says which arguments a launch has.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

SIZES = (("m", "int32"), ("n", "int32"), ("k", "int32"), ("has_bias", "int32"))
TRAILING = (("global_scratch", "pointer"), ("profile_scratch", "pointer"))
# Kernel → pointers, group sizes, order of K in quantized activations.
GEMMS = {
    "gemm_w8a8": (("x", "x_scale", "w", "w_scale"), (0,), "natural"),
    "gemm_w4a8": (("x", "x_scale", "w", "w_scale"), (64, 128), "even_odd"),
    "gemm_w8a8_nested": (("x", "x_scale", "w_high", "w_low", "w_scale"), (0,), "even_odd"),
    "gemm_w8a16": (("x", "w", "w_scale"), (0,), "natural"),
    "gemm_w8a16_nested": (("x", "w_high", "w_low", "w_scale"), (0,), "natural"),
    "gemm_w4a16": (("x", "w", "w_scale"), (64, 128), "natural"),
    "gemm_16": (("x", "w"), (0,), "natural"),
    "gemm_fp8": (("x", "x_scale", "w", "w_scale"), (0,), "natural"),
}
QUANTIZERS = {
    "quantize_tokens": (
        ("x", "smooth", "q", "scale"),
        (("k", "int32"), ("maximum", "float32"), ("has_smooth", "int32")),
    ),
    "quantize_fp8": (("x", "scale", "q"), (("k", "int32"),)),
}
# (block_m, num_warps, shared_bytes): the second needs more shared memory than a kernel gets without asking, and more
# than an 8.9 has, which takes cubins of 8.0.
TILES = ((16, 4, 8192), (64, 8, 131072))
TARGETS = ("sm80", "sm90")


def entries() -> Iterator[dict[str, Any]]:
    """All kernels of the library; fp8 only where the hardware has it."""
    for target, dtype in product(TARGETS, ("fp16", "bf16")):
        for (name, (pointers, rest)), order in product(QUANTIZERS.items(), ("natural", "even_odd")):
            if "fp8" not in name or (target == "sm90" and order == "natural"):
                yield _entry(name, target, dtype, order, (*_pointers(pointers), *rest), (1, 4, 0))
        for (name, (pointers, groups, order)), tile in product(GEMMS.items(), TILES):
            if "fp8" not in name or target == "sm90":
                parameters = (*_pointers((*pointers, "bias", "y")), *SIZES)
                for group in groups:
                    yield _entry(name, target, dtype, order, parameters, tile, group)


def _pointers(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name, "pointer") for name in names)


def _entry(
    kernel: str,
    target: str,
    dtype: str,
    order: str,
    parameters: tuple[tuple[str, str], ...],
    tile: tuple[int, int, int],
    group: int = 0,
) -> dict[str, Any]:
    block_m, num_warps, shared_bytes = tile
    symbol = f"{kernel}_{target}_{dtype}_{order}_g{group}_m{block_m}"
    all_parameters = [{"name": name, "type": kind} for name, kind in (*parameters, *TRAILING)]
    divisible = [p["name"] for p in all_parameters if p["type"] == "pointer" or p["name"] in ("n", "k")]
    return {
        "kernel": kernel, "target": target, "dtype": dtype, "order": order, "group": group,
        "block_m": block_m, "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": num_warps, "num_stages": 3,
        "shared_bytes": shared_bytes, "registers": 32, "spill_bytes": 0, "symbol": symbol, "file": f"{symbol}.cubin",
        "parameters": all_parameters, "divisible_by_16": divisible,
    }  # fmt: skip


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The folder: kernels.json and the files that it names."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    rows = list(entries())
    for row in rows:
        parameters = " ".join(f"{p['name']}:{p['type']}" for p in row["parameters"])
        cubin = f"stand-in {row['symbol']} {parameters}".encode()
        (folder / row["file"]).write_bytes(cubin)
        row["sha256"] = hashlib.sha256(cubin).hexdigest()
    (folder / "kernels.json").write_text(json.dumps({"schema_version": 1, "kernels": rows}), encoding="utf-8")
    return folder

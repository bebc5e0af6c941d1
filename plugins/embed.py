"""Write a C++ source that embeds ahead-of-time compiled kernels: the build step between kernels.json and the library.

CMake runs this file as a script, without the package: `python embed.py KERNELS OUTPUT`. KERNELS is the folder that
`adatsq-trt build plugins` fills (kernels.json and cubins), OUTPUT the C++ file that defines the table of
library/src/kernels.h.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

# Name of a launch parameter in kernels.json → its type there and the enumerator of Argument in library/src/kernels.h.
PARAMETERS = {
    "x": ("pointer", "kX"),  # kQ where there is an x_scale: then the kernel reads what a quantizer wrote
    "q": ("pointer", "kQ"),
    "x_scale": ("pointer", "kXScale"),
    "scale": ("pointer", "kXScale"),
    "smooth": ("pointer", "kSmoothing"),
    "w": ("pointer", "kW"),
    "w_high": ("pointer", "kW"),
    "w_low": ("pointer", "kLo"),
    "w_scale": ("pointer", "kWScale"),
    "bias": ("pointer", "kBias"),
    "y": ("pointer", "kY"),
    "global_scratch": ("pointer", "kScratch"),
    "profile_scratch": ("pointer", "kScratch"),
    "m": ("int32", "kM"),
    "n": ("int32", "kN"),
    "k": ("int32", "kK"),
    "has_bias": ("int32", "kHasBias"),
    "has_smooth": ("int32", "kHasSmoothing"),
    "maximum": ("float32", "kMaximum"),
}
ORDERS = {"natural": "kNatural", "even_odd": "kEvenOdd"}
ELEMENTS = {"fp16": "kFp16", "bf16": "kBf16"}


class EmbedError(Exception):
    """A kernels folder that does not hold what kernels.json promises."""


def read_kernels(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Read and check kernels.json.

    Args:
        folder: with kernels.json and the cubins that it names.

    Returns:
        The kernels, ordered as the library wants them (tiles ascending), and the sha256 of kernels.json.

    Raises:
        EmbedError: a file that is missing, altered or of another schema version; a parameter that the library does not
            know.
    """
    try:
        text = (folder / "kernels.json").read_bytes()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise EmbedError(f"cannot read '{folder / 'kernels.json'}': {error}; run `adatsq-trt build plugins`") from error
    if content.get("schema_version") != SCHEMA_VERSION:
        raise EmbedError(
            f"'{folder / 'kernels.json'}' has schema version {content.get('schema_version')}; expected {SCHEMA_VERSION}"
        )
    kernels = sorted(content["kernels"], key=_order)
    for kernel in kernels:
        _check_cubin(folder, kernel)
        _check_parameters(kernel)
    return kernels, hashlib.sha256(text).hexdigest()


def _order(kernel: dict[str, Any]) -> tuple[object, ...]:
    tile = (kernel["block_m"], kernel["block_n"], kernel["block_k"], kernel["num_warps"], kernel["num_stages"])
    return (kernel["kernel"], kernel["target"], kernel["dtype"], kernel["group"], *tile, kernel["symbol"])


def _check_cubin(folder: Path, kernel: dict[str, Any]) -> None:
    path = folder / kernel["file"]
    if Path(kernel["file"]).name != kernel["file"] or not path.is_file():
        raise EmbedError(f"kernel '{kernel['symbol']}': there is no cubin '{path}'")
    if hashlib.sha256(path.read_bytes()).hexdigest() != kernel["sha256"]:
        raise EmbedError(f"kernel '{kernel['symbol']}': '{path}' is not the cubin whose sha256 kernels.json states")


def _check_parameters(kernel: dict[str, Any]) -> None:
    for parameter in kernel["parameters"]:
        expected, _ = PARAMETERS.get(parameter["name"], (None, None))
        if parameter["type"] != expected:
            known = ", ".join(f"{name} ({kind})" for name, (kind, _) in PARAMETERS.items())
            raise EmbedError(
                f"kernel '{kernel['symbol']}': parameter '{parameter['name']}' of type '{parameter['type']}' is none "
                f"that the library passes; it passes {known}"
            )


def source_of(folder: Path, kernels: Iterable[dict[str, Any]], digest: str) -> str:
    """C++ text: the cubins through the assembler's .incbin, and the table that points to them."""
    kernels = list(kernels)
    cubins = "\n".join(_incbin(i, folder / kernel["file"]) for i, kernel in enumerate(kernels))
    parameters = "\n".join(_parameters(i, kernel) for i, kernel in enumerate(kernels))
    rows = "\n".join(_row(i, kernel) for i, kernel in enumerate(kernels))
    return f"""// Written by plugins/embed.py.
#include "kernels.h"

{cubins}

namespace adatsq {{
{parameters}

const Kernel kKernels[] = {{
{rows}
}};
const std::size_t kKernelCount = {len(kernels)};
const char* const kKernelsDigest = "{digest}";
}}  // namespace adatsq
"""


def _incbin(index: int, cubin: Path) -> str:
    path = json.dumps(json.dumps(str(cubin.resolve())))  # quoted for the assembler, then for C++
    # The driver reads the cubin as an ELF file, which wants 8-byte alignment.
    return (
        f'asm(".pushsection .rodata\\n.balign 16\\nadatsq_cubin_{index}:\\n"\n'
        f'    ".incbin " {path} "\\n.byte 0\\n.popsection");\n'
        f'extern "C" __attribute__((visibility("hidden"))) const unsigned char adatsq_cubin_{index}[];'
    )


def _parameters(index: int, kernel: dict[str, Any]) -> str:
    names = [parameter["name"] for parameter in kernel["parameters"]]
    arguments = {name: argument for name, (_, argument) in PARAMETERS.items()}
    if "x_scale" in names:
        arguments["x"] = arguments["q"]
    divisible = kernel.get("divisible_by_16", ())
    items = ", ".join(f"{{Argument::{arguments[name]}, {str(name in divisible).lower()}}}" for name in names)
    return f"static const Parameter kParameters{index}[] = {{{items}}};"


def _row(index: int, kernel: dict[str, Any]) -> str:
    values = (
        json.dumps(kernel["kernel"]),
        int(kernel["target"].removeprefix("sm")),
        f"Element::{ELEMENTS[kernel['dtype']]}",
        kernel["group"],
        f"Order::{ORDERS[kernel['order']]}",
        kernel["block_m"],
        kernel["block_n"],
        32 * kernel["num_warps"],
        kernel["shared_bytes"],
        json.dumps(kernel["symbol"]),
        f"kParameters{index}",
        len(kernel["parameters"]),
        f"adatsq_cubin_{index}",
    )
    return f"    {{{', '.join(map(str, values))}}},"


def main(arguments: list[str]) -> int:
    """Run the script; the exit code is 2 for a folder that cannot be embedded."""
    kernels, output = map(Path, arguments)
    try:
        table, digest = read_kernels(kernels)
    except EmbedError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    output.write_text(source_of(kernels, table, digest), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

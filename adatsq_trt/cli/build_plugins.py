"""`adatsq-trt build plugins`: the kernels as cubins, and the TensorRT plugin library around them."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adatsq_trt.plugins.aot import KernelTable


def plugins(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the cubins and the library.")],
    targets: Annotated[
        str, typer.Option("--targets", help="What to compile for, separated by commas.")
    ] = "sm80,sm86,sm89,sm90,sm120",
    tensorrt_root: Annotated[
        Path | None,
        typer.Option(
            "--tensorrt-root",
            help="Folder whose include/ holds TensorRT's headers.",
            show_default="TENSORRT_ROOT, else the system's",
        ),
    ] = None,
    tuning: Annotated[
        Path | None,
        typer.Option("--tuning", help="Table of tiles to compile with.", show_default="the package's"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Compilers at a time.", show_default="one per processor")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compile the kernels of w8a8, w4a8 and their like for GPUs, without one.

    Where TensorRT's headers and CMake are, the plugin library is built around them.

    Example: adatsq-trt build plugins --targets sm80,sm89 -o build/plugins
    """
    from contextlib import ExitStack

    from adatsq_trt.cli.progress import progress
    from adatsq_trt.plugins.build import build_plugins
    from adatsq_trt.plugins.tiles import TABLE, load_tiles

    workers = jobs or os.cpu_count() or 1
    with ExitStack() as stack:

        def start(total: int) -> Callable[[], None]:
            return stack.enter_context(progress("compiling kernels", total))

        built = build_plugins(targets.split(","), output, load_tiles(tuning or TABLE), workers, tensorrt_root, start)
    if json:
        content = built.table.model_dump(mode="json")
        library = str(built.library) if built.library else None
        typer.echo(json_format.dumps({**content, "library": library, "left_out": built.left_out}, indent=2))
        return
    _print(built.table)
    typer.echo(str(built.library) if built.library else built.left_out)


def _print(table: KernelTable) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    name = Column("cubin", overflow="fold")  # a name that is cut off names no file
    rows = Table(name, "warps", "registers", "shared memory", "spills", box=None)
    for entry in table.kernels:
        shared, spills = f"{entry.shared_bytes / 1024:.1f} KiB", f"{entry.spill_bytes} B"
        rows.add_row(entry.file, str(entry.num_warps), str(entry.registers), shared, spills)
    Console().print(rows)

"""`adatsq-trt benchmark kernels`: the plugin's kernels on this machine's GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def kernels(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the fastest tiles of this GPU, for 'build plugins --tuning'.")
    ] = False,
    tuning: Annotated[
        Path | None, typer.Option("--tuning", help="Table of tiles to start from.", show_default="the package's")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Compilers at a time, with --tune.", show_default="one per processor"),
    ] = None,
) -> None:
    """Compare the kernels with PyTorch: first the numbers, then the time.

    Example: adatsq-trt benchmark kernels -o results.json
    """
    import importlib.util

    from adatsq_trt.errors import DependencyError

    if importlib.util.find_spec("triton") is None:
        raise DependencyError("the kernels need the Triton language; run: pip install 'adatsq-trt[plugins]'")
    if tune:
        _tune(output, tuning, jobs or os.cpu_count() or 1)
        return
    from adatsq_trt.plugins.benchmark import benchmark

    benchmark(output, tuning)


def _tune(output: Path, table: Path | None, jobs: int) -> None:
    from collections.abc import Callable
    from contextlib import ExitStack
    from datetime import UTC, datetime

    import torch

    from adatsq_trt.cli.progress import progress
    from adatsq_trt.plugins.benchmark import written_whole
    from adatsq_trt.plugins.tiles import TABLE, dump_tiles, load_tiles
    from adatsq_trt.plugins.tune import tune

    known = load_tiles(table or TABLE)
    with ExitStack() as stack:
        part = stack.enter_context(written_whole(output))

        def start(total: int) -> Callable[[], None]:
            return stack.enter_context(progress("tuning kernels", total))

        tuned = tune(jobs, start)
        target = next(iter(tuned)).target
        origin = f"{target} tuned on {torch.cuda.get_device_name()}, {datetime.now(UTC).date()}; the rest as before."
        part.write_text(dump_tiles({**known, **tuned}, origin), encoding="utf-8")

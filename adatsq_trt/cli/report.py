"""`adatsq-trt report`: a run as one page."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory with a finished build.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file.", show_default="report.html in the run directory")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the paths of what was written as JSON.")] = False,
) -> None:
    """Write a run as one HTML page that needs no network.

    What was built, where the bits go, what they cost, checks, time and memory, and how to reproduce all of it. The
    figures are also written as SVG and PNG to report/ in the run directory.

    Example: adatsq-trt report runs/demo
    """
    from adatsq_trt.report.page import FIGURES_FOLDER, write_report
    from adatsq_trt.stages.report import gather
    from adatsq_trt.stages.run_directory import RunDirectory

    directory = RunDirectory.existing(run)
    written = write_report(gather(directory), output or run / "report.html", run / FIGURES_FOLDER)
    if json:
        paths = {"page": str(written.page), "figures": [str(file) for file in written.figures]}
        typer.echo(json_format.dumps(paths, indent=2))
    else:
        typer.echo(f"{written.page}: {len(written.figures) // 2} figures, also in {run / FIGURES_FOLDER}")

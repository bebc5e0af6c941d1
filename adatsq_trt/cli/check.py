"""`adatsq-trt check`: compare a bundle's graphs with the fake-quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adatsq_trt.errors import AdatsqError

if TYPE_CHECKING:
    from rich.table import Table

    from adatsq_trt.engines.accuracy import CheckReport


def check(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the report.", show_default="check/ beside the bundle"),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compare anew, also when this very bundle has passed before.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a bundle's graphs with the fake-quantized PyTorch model.

    Every step's cpu graph is compared in ONNX Runtime, one block of every target graph in onnx's reference evaluator.
    Exit code 1 when a comparison fails. A bundle that has passed and is unchanged, file by file, is not compared anew.

    Example: adatsq-trt check runs/demo
    """
    from rich.console import Console

    from adatsq_trt.cli.progress import progress
    from adatsq_trt.engines.accuracy import check as run_check
    from adatsq_trt.engines.accuracy import passed_before
    from adatsq_trt.engines.bundle import BundleFiles

    opened = BundleFiles.open(bundle)
    folder = output or opened.folder.parent / "check"
    rows = opened.policy.steps + sum(graph.variant == "target" for graph in opened.index.graphs)
    report = None if again else passed_before(opened, folder)
    if report is None:
        with progress("check", rows) as advance:
            report = run_check(opened, folder, lambda _done, _all: advance())
    else:
        typer.echo("this bundle has passed before and is unchanged; pass --again to compare anew", err=True)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(_table(report, folder))
    if not report.passed:
        failed = [f"step {r.step} ({r.variant})" for r in report.rows if not r.passed]
        raise AdatsqError(f"check failed at {', '.join(failed) or 'missing rows'}; see '{folder / 'check.json'}'")


def _table(report: CheckReport, folder: Path) -> Table:
    from rich.table import Table

    table = Table("step", "assignment", "variant", "checked", "against", "median", "≤", "relative", "≤", "", box=None)
    for row in report.rows:
        table.add_row(
            str(row.step),
            str(row.assignment),
            row.variant,
            row.block or row.computed_by,
            row.reference,
            _figure(row.median_error),
            _figure(row.median_tolerance),
            _figure(row.relative_error),
            _figure(row.relative_tolerance),
            "ok" if row.passed else "FAILED",
        )
    table.caption = f"every row's arrays and the command that repeats it: {folder / 'check.json'}"
    return table


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}"

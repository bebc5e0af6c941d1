"""`adatsq-trt check`: compare a bundle's graphs with the fake-quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adatsq_trt.cli.backends import BackendName
from adatsq_trt.errors import AdatsqError

if TYPE_CHECKING:
    from rich.table import Table

    from adatsq_trt.engines.accuracy import CheckReport, CheckRow

_SHOWN_FAILURES = 12


def check(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the report.", show_default="check/ beside the bundle"),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            "--fail-above",
            min=0,
            help="Largest relative error of the last latent against full precision.",
            show_default="no limit",
        ),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first layer at which a wrong graph leaves the tolerance.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="JUnit XML file to write as well.", show_default="none")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compare anew, also when this very bundle has passed before.")
    ] = False,
    backend: Annotated[
        BackendName, typer.Option("--backend", help="Whose plans to compare as well; onnxruntime compares none.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a bundle's graphs with the fake-quantized PyTorch model.

    Every step and, for each bucket, every layer of the cpu graphs is compared in ONNX Runtime, as is every step of the
    full-precision graph; every layer and module of the target graphs in onnx's reference evaluator; the denoising loop
    as a whole; guidance, sigmas, scales and constants bit for bit. Where plans run, every plan is compared with the cpu
    graph of the same step, and the plans' loop with PyTorch's. Exit code 1 when a comparison fails. A bundle that
    has passed and is unchanged, file by file, is not compared anew.

    Example: adatsq-trt check runs/demo --bisect --junit check.xml
    """
    from rich.console import Console

    from adatsq_trt import api
    from adatsq_trt.cli.progress import bars
    from adatsq_trt.engines.accuracy import write_junit

    opened = api.load(bundle, backend)
    typer.echo(opened.choice.sentence, err=True)
    folder = output or opened.path.parent / "check"
    with bars() as progress:
        report = api.check(opened, output=folder, fail_above=fail_above, bisect=bisect, again=again, progress=progress)
    if junit is not None:
        write_junit(junit, report)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(_table(report, folder, opened.manifest.shapes[0].name if opened.manifest.shapes else None))
    if not report.passed:
        raise AdatsqError(_failure(report, folder))


def _failure(report: CheckReport, folder: Path) -> str:
    """Say in one sentence which comparisons failed."""
    parts = []
    failed = list(dict.fromkeys(f"step {r.step} ({r.variant})" for r in report.rows if not r.passed))
    if failed:
        more = f" and {len(failed) - _SHOWN_FAILURES} more" if len(failed) > _SHOWN_FAILURES else ""
        parts.append(f"at {', '.join(failed[:_SHOWN_FAILURES])}{more}")
    unequal = [row.subject for row in report.exact if not row.passed]
    if unequal:
        parts.append(f"in what must be exactly as exported ({', '.join(unequal)})")
    if not report.loop.passed:
        parts.append("in the denoising loop")
    if report.plan_loop is not None and not report.plan_loop.passed:
        parts.append("in the denoising loop of the plans")
    advice = "" if report.first_layers or not failed else "; --bisect names the first wrong layer"
    return f"check failed {' and '.join(parts)}; see '{folder / 'check.json'}'{advice}"


def _table(report: CheckReport, folder: Path, shape: str | None) -> Table:
    """A line for each bucket and variant with its worst row, the loop, and what failed; `shape` is one of several."""
    from rich.table import Table

    from adatsq_trt.engines.accuracy.report import figure

    size = "" if shape is None else f" at {shape}"
    table = Table("steps", "variant", "outputs", "median", "≤", "relative", "≤", "", box=None)
    for index, (first, last) in enumerate(report.buckets):
        for variant in ("cpu", "target", "plan", "reference"):
            rows = [row for row in report.rows if (row.bucket, row.variant) == (index, variant)]
            if rows:
                table.add_row(f"{first}–{last}", variant, str(len(rows)), *_worst(rows), _verdict(rows))
    verdict = "ok" if all(row.passed for row in report.exact) else "FAILED"
    table.add_row("all", "exact", str(len(report.exact)), "", "", "", "", verdict)
    loop = report.loop
    for name, own in (("loop", loop), ("loop of plans", report.plan_loop)):
        if own is not None and own.rows:
            worst = max(own.rows, key=lambda row: float("inf") if row.error is None else row.error / row.tolerance)
            verdict = "ok" if own.passed else "FAILED"
            table.add_row(
                "all", name, str(len(own.rows)), "", "", figure(worst.error), figure(worst.tolerance), verdict
            )
    lines = [f"{row.subject}: {row.finding}" for row in report.rows if not row.passed][:_SHOWN_FAILURES]
    lines += [f"{row.subject}: {row.failure}" for row in report.exact if not row.passed]
    lines += [layer.sentence for layer in report.first_layers]
    lines += [f"the first of them again, in '{folder}': {row.command}" for row in report.rows if not row.passed][:1]
    last_error = figure(loop.rows[-1].quantization_error) if loop.rows else "none"
    limit = "" if loop.fail_above is None else f" (limit {loop.fail_above:g})"
    lines.append(f"relative error of the last latent against full precision: {last_error}{limit}{size}")
    lines.append(f"every row's arrays and the command that repeats it: {folder / 'check.json'}")
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table


def _worst(rows: list[CheckRow]) -> tuple[str, str, str, str]:
    """The figures that come nearest to their limits, beside these."""
    medians = [(row.median_error, row.median_tolerance) for row in rows if row.median_tolerance is not None]
    return *_nearest(medians), *_nearest([(row.relative_error, row.relative_tolerance) for row in rows])


def _nearest(figures: list[tuple[float | None, float]]) -> tuple[str, str]:
    """The error that is the largest part of its limit; one that is not known counts as the largest."""
    from adatsq_trt.engines.accuracy.report import figure

    def part(pair: tuple[float | None, float]) -> float:
        return float("inf") if pair[0] is None or not pair[1] else pair[0] / pair[1]

    error, limit = max(figures, key=part, default=(None, None))
    return figure(error), figure(limit)


def _verdict(rows: list[CheckRow]) -> str:
    return "ok" if all(row.passed for row in rows) else "FAILED"

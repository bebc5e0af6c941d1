"""`adatsq-trt inspect`: what a run or bundle holds, and what of it runs here."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adatsq_trt.stages.shapes import written

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from adatsq_trt.engines.inspection import Inspection
    from adatsq_trt.report.summary import Summary

_SHADES = "░▒▓█"


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show a bundle: its policy as a picture, its buckets, formats and sizes, and what of it runs on this machine.

    Example: adatsq-trt inspect runs/demo
    """
    from rich.console import Console

    from adatsq_trt.cli.tables import size_table
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.inspection import inspect_bundle

    files = BundleFiles.open(bundle)
    seen, summary = inspect_bundle(files), _summary(files.folder.parent)
    if json:
        costs = None if summary is None else summary.policies[0].model_dump(mode="json")
        typer.echo(json_format.dumps(seen.model_dump(mode="json") | {"costs": costs}, indent=2))
        return
    console = Console(highlight=False)
    console.print(_headline(seen))
    if summary is not None:
        console.print(_costs(summary), soft_wrap=True)
    console.print(_sizes(seen), soft_wrap=True)
    console.print(_picture(seen))
    console.print(_buckets(seen))
    console.print(_kinds(seen))
    if seen.sizes is not None:
        console.print(size_table(seen.sizes))
    versions = ", ".join(f"{name} {version}" for name, version in seen.manifest.versions.items())
    console.print(f"made with: {versions or 'not recorded'}")
    for backend, obstacle in seen.here.items():
        console.print(f"{backend}: {obstacle or 'runs here'}", soft_wrap=True)


def _summary(run: Path) -> Summary | None:
    """The figures of the build, where the bundle lies in its run directory."""
    from adatsq_trt.files import read_json_model
    from adatsq_trt.report.summary import Summary
    from adatsq_trt.stages.summary import SUMMARY_NAME

    return read_json_model(run / SUMMARY_NAME, Summary) if (run / SUMMARY_NAME).is_file() else None


def _costs(summary: Summary) -> str:
    """Describe the policy's costs: resident weights, activation bits, time and number of engines."""
    chosen = summary.policies[0]
    ms = "" if summary.ms is None else f"{summary.ms:.4g} ms per sample ({summary.ms_source}), "
    return (
        f"resident weights {chosen.costs.resident_bytes / 1e6:.4g} MB ({chosen.resident_bits:.2f} bits per quantized "
        f"weight), {chosen.costs.activation_bits:.2f} activation bits, {ms}{summary.engines} engines or graphs"
    )


def _headline(seen: Inspection) -> str:
    manifest = seen.manifest
    return (
        f"{manifest.model} ({manifest.architecture}): {len(manifest.schedule.timesteps)} steps, {seen.mean_bits:.3f} "
        f"mean bits, {len({row.assignment for row in seen.buckets})} assignments in {len(seen.buckets)} buckets, "
        f"targets {', '.join(manifest.targets) or 'none'}, backend {manifest.backend}, layout {manifest.layout}"
    )


def _sizes(seen: Inspection) -> str:
    """Describe the sizes of pictures, with the samples of each optimization profile."""
    shapes = seen.manifest.shapes
    if not shapes:
        return f"sizes: its own, latents {written(seen.manifest.latent_shape)}"
    listed = (f"{shape.name} by {', '.join(map(str, shape.batches))}" for shape in shapes)
    return f"sizes by samples: {'; '.join(listed)}; policy and check are of {shapes[0].name}"


def _picture(seen: Inspection) -> Text:
    """One line for each block, one character for each step, darker for more bits."""
    from rich.text import Text

    numbers = [bits for row in seen.bits.values() for bits in row] or [0.0]
    low, high = min(numbers), max(numbers)
    width = max(map(len, seen.bits), default=0)
    lines = [f"{block:{width}}  {''.join(_shade(b, low, high) for b in row)}" for block, row in seen.bits.items()]
    legend = f"{'':{width}}  one column per step; {_SHADES[0]} {low:.1f} to {_SHADES[-1]} {high:.1f} bits"
    return Text("\n".join(["", *lines, legend, ""]), no_wrap=True)


def _shade(bits: float, low: float, high: float) -> str:
    part = (bits - low) / (high - low) if high > low else 0.0
    return _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]


def _buckets(seen: Inspection) -> Table:
    from rich.table import Table

    table = Table("steps", "assignment", "layers by format", "plans", box=None)
    for row in seen.buckets:
        steps = str(row.first) if row.first == row.last else f"{row.first}-{row.last}"
        formats = ", ".join(f"{count} {name}" for name, count in row.formats.items())
        table.add_row(steps, str(row.assignment), formats, "\n".join(row.plans) or "none")
    return table


def _kinds(seen: Inspection) -> Table:
    from rich.table import Table

    names = sorted({name for shares in seen.kinds.values() for name in shares})
    table = Table("layers", *names, box=None, title="share of steps", title_justify="left")
    for kind, shares in seen.kinds.items():
        table.add_row(kind, *(f"{shares[name]:.0%}" if name in shares else "" for name in names))
    return table

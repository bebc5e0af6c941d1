"""`adatsq-trt inspect`: what a run or bundle holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show a bundle: its buckets of steps, their formats and the size of their plans.

    Example: adatsq-trt inspect runs/demo
    """
    from rich.console import Console
    from rich.table import Table

    from adatsq_trt.engines.bundle import BundleFiles

    opened = BundleFiles.open(bundle)
    manifest, policy = opened.manifest, opened.policy
    if json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    console = Console()
    console.print(
        f"{manifest.model} ({manifest.architecture}): {policy.steps} steps, {len(policy.layers)} layers, "
        f"{policy.mean_bits:.3f} mean bits, {len(policy.assignments)} assignments, targets "
        f"{', '.join(manifest.targets) or 'none'}, backend {manifest.backend}, layout {manifest.layout}",
        highlight=False,
    )
    plans: Counter[int | None] = Counter()
    for plan in manifest.plans:
        plans[plan.assignment] += plan.bytes
    table = Table("steps", "assignment", "layers by format", "plans", box=None)
    for bucket in policy.buckets:
        formats = Counter(policy.assignments[bucket.assignment])
        steps = str(bucket.first) if bucket.first == bucket.last else f"{bucket.first}-{bucket.last}"
        shares = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        size = plans[bucket.assignment]
        table.add_row(steps, str(bucket.assignment), shares, f"{size / 1e6:.1f} MB" if size else "none")
    console.print(table)

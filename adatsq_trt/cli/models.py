"""`adatsq-trt models`: the models that ship with the package."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer


def models(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the models that ship with the package."""
    from rich.console import Console
    from rich.table import Table

    from adatsq_trt.zoo import list_models

    rows = list_models()
    if json:
        typer.echo(json_format.dumps([row.model_dump() for row in rows], indent=2))
        return
    table = Table("name", "architecture", "pixels", "weights", "steps", "guidance", box=None)
    for row in rows:
        size = f"{row.image_size} x {row.image_size}" + (f" x {row.frames}" if row.frames else "")
        weights = f"{row.weight_bytes / 1e6:.2f} MB"
        table.add_row(row.name, row.architecture, size, weights, str(row.default_steps), f"{row.default_guidance:g}")
    Console().print(table)

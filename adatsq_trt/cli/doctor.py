"""`adatsq-trt doctor`: what this machine can do, and what to install for the rest."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adatsq_trt.engines.capabilities import Capability, diagnose
from adatsq_trt.errors import UserError


def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Look at the GPU: driver, libraries, and what would run a bundle on it.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            help="With --gpu: a bundle or run directory to run, check and time there.",
            show_default="the demo's model, built for the GPU that is there",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --gpu: JSON file to write.", show_default="none")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what this machine can do and what to install for the rest.

    With --gpu, a report that can be attached to a bug report; exit code 1 when something that was tried went wrong.

    Example: adatsq-trt doctor --gpu --output gpu.json
    """
    if gpu:
        from adatsq_trt.cli.doctor_gpu import examine

        examine(bundle, output, json)
        return
    if bundle is not None or output is not None:
        raise UserError("--bundle and --output belong to --gpu; add it, or leave them out")
    capabilities = diagnose()
    if json:
        typer.echo(json_format.dumps([asdict(capability) for capability in capabilities], indent=2))
        return
    _print(Console(markup=False, highlight=False), capabilities)


def _print(console: Console, capabilities: list[Capability]) -> None:
    table = Table("what", "found", "detail", box=None)
    for item in capabilities:
        table.add_row(item.name, Text("yes", "green") if item.found else Text("no", "yellow"), Text(item.detail))
    console.print(table)
    missing = [item for item in capabilities if not item.found]
    if missing:
        console.print("\nTo get the rest, as far as you need it ('-e .' in a checkout of adatsq-trt):")
    for item in missing:
        # Soft-wrapped, so that a command can be copied whole.
        console.print(f"  {item.name}, for {item.needed_for}:\n      {item.advice}", soft_wrap=True)

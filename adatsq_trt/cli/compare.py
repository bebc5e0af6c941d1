"""`adatsq-trt compare`: what the Fisher weighting of the Hessians is worth for a finished policy."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def compare(
    run: Annotated[Path, typer.Argument(help="A run directory with a finished search.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure what the weights' solver is worth for a run's policy.

    The same policy with weights from the run's Hessians, from unweighted ones and rounded to nearest, each on the
    run's held-out pictures; and uniform integer formats beside rounding to nearest with one scale per channel.

    Example: adatsq-trt compare runs/demo
    """
    from rich.console import Console
    from rich.table import Table

    from adatsq_trt.cli.progress import bars
    from adatsq_trt.progress import Reporter
    from adatsq_trt.stages.compare import solver_errors
    from adatsq_trt.stages.models import open_run

    with bars() as progress:
        errors = solver_errors(open_run(run, Reporter(progress)))
    if json:
        typer.echo(json_format.dumps(errors, indent=2))
        return
    table = Table("subject", "weights", "latent MSE on held-out samples", "of the subject's first", box=None)
    for subject, solvers in errors.items():
        first = next(iter(solvers.values()))
        for name, error in solvers.items():
            table.add_row(subject, name, f"{error:.4e}", f"{error / first:.3f} ×" if first else "")
    Console().print(table)

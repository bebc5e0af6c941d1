"""The command line: one file per command, and one place where errors become a sentence and an exit code."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from adatsq_trt import __version__
from adatsq_trt.cli.build import engine
from adatsq_trt.cli.calibrate import calibrate
from adatsq_trt.cli.check import check
from adatsq_trt.cli.compare import compare
from adatsq_trt.cli.doctor import doctor
from adatsq_trt.cli.export import export
from adatsq_trt.cli.generate import generate
from adatsq_trt.cli.inspect import inspect
from adatsq_trt.cli.models import models
from adatsq_trt.cli.quantize import quantize
from adatsq_trt.cli.search import search
from adatsq_trt.errors import AdatsqError

_DEBUG = "--debug"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
build_app = typer.Typer(no_args_is_help=True)
app.add_typer(build_app, name="build", help="Build what runs on the target: engines.")
build_app.command()(engine)
for _command in (calibrate, quantize, search, export, check, generate, compare, inspect, doctor, models):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks and every log message.")] = False,
) -> None:
    """Timestep-aware mixed precision for diffusion transformers, down to TensorRT engines."""
    handler = RichHandler(console=Console(stderr=True), show_path=debug, show_time=debug)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("adatsq_trt").setLevel(logging.DEBUG if debug else logging.INFO)


def main() -> None:
    """Run the command line: a user's mistake is one sentence and exit code 2, a failure is exit code 1."""
    try:
        app()
    except AdatsqError as error:
        if _DEBUG in sys.argv:
            raise
        typer.echo(f"adatsq-trt: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("adatsq-trt: interrupted; the same command goes on where this one stopped", err=True)
        sys.exit(130)

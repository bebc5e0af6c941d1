"""The command line: one file per command, and one place where errors become a sentence and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from adatsq_trt import __version__
from adatsq_trt.cli.benchmark import bundle, kernels
from adatsq_trt.cli.build import calibrate, engine, export, quantize, search
from adatsq_trt.cli.build_plugins import plugins
from adatsq_trt.cli.check import check
from adatsq_trt.cli.compare import compare
from adatsq_trt.cli.deploy import triton
from adatsq_trt.cli.doctor import doctor
from adatsq_trt.cli.evaluate import evaluate
from adatsq_trt.cli.generate import generate
from adatsq_trt.cli.homes import expanding_homes
from adatsq_trt.cli.inspect import inspect
from adatsq_trt.cli.models import models
from adatsq_trt.cli.policy import export as export_policy
from adatsq_trt.cli.policy import import_ as import_policy
from adatsq_trt.cli.report import report
from adatsq_trt.cli.serve import serve
from adatsq_trt.errors import AdatsqError

_DEBUG = "--debug"
_INTERRUPTED = 130
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
build_app = typer.Typer(no_args_is_help=True)
app.add_typer(build_app, name="build", help="Build what runs on the target: engines and their plugins.")
build_app.command()(expanding_homes(engine))
build_app.command(no_args_is_help=True)(expanding_homes(plugins))
benchmark_app = typer.Typer(no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark", help="Measure on this machine: bundles, and the kernels of the plugin.")
for _benchmark_command in (bundle, kernels):
    benchmark_app.command(no_args_is_help=True)(expanding_homes(_benchmark_command))
deploy_app = typer.Typer(no_args_is_help=True)
app.add_typer(deploy_app, name="deploy", help="Write what a server loads.")
deploy_app.command(no_args_is_help=True)(expanding_homes(triton))
policy_app = typer.Typer(no_args_is_help=True)
app.add_typer(policy_app, name="policy", help="Policies in the words of other programs.")
policy_app.command("export", no_args_is_help=True)(expanding_homes(export_policy))
policy_app.command("import", no_args_is_help=True)(expanding_homes(import_policy))
_WITH_ARGUMENTS: tuple[Callable[..., object], ...] = (check, generate, inspect, compare, evaluate, report, serve)
# Those that build say how to begin where no model is named.
_COMMANDS: tuple[Callable[..., object], ...] = (calibrate, quantize, search, export, *_WITH_ARGUMENTS, models, doctor)
for _command in _COMMANDS:
    app.command(no_args_is_help=_command in _WITH_ARGUMENTS)(expanding_homes(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog="Start with: adatsq-trt build engine digits-flux --target sm120")
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks and every log message.")] = False,
) -> None:
    """Timestep-aware mixed precision for diffusion transformers, down to TensorRT engines."""
    from adatsq_trt.cli.progress import LogHandler

    layout = "%(levelname)s %(name)s: %(message)s" if debug else "adatsq-trt: %(message)s"
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format=layout, handlers=[LogHandler()], force=True
    )
    logging.getLogger("adatsq_trt").setLevel(logging.DEBUG if debug else logging.INFO)


def main() -> None:
    """Run the command line: a user's mistake is one sentence and exit code 2, a failure is exit code 1."""
    try:
        app(prog_name="adatsq-trt")
    except AdatsqError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, its permissions and the room on its disk", 2)
    except MemoryError as error:
        _fail(f"not enough memory: {error}; ask for fewer samples, or use a machine with more", 1)
    except Exception as error:
        advice = f"please report this with the output of 'adatsq-trt {_DEBUG} ...'"
        _fail(f"unexpected {type(error).__name__}: {error}; {advice}", 1)
    except SystemExit as end:  # Typer has turned Ctrl-C into its exit code, without a word
        if end.code == _INTERRUPTED:
            typer.echo("adatsq-trt: interrupted; the same command goes on where this one stopped", err=True)
        raise


def _fail(message: str, exit_code: int) -> NoReturn:
    if _DEBUG in sys.argv:
        traceback.print_exc()
    typer.echo(f"adatsq-trt: {message}", err=True)
    sys.exit(exit_code)

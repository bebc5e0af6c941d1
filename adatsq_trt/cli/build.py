"""`adatsq-trt build engine` and the commands of single stages, whose options are the fields of `BuildConfig`."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Union, get_args, get_origin

import typer

from adatsq_trt.config import RENAMED, choice_of, choices, option_name

if TYPE_CHECKING:
    from adatsq_trt.api import Job
    from adatsq_trt.stages.graph import Build

_MODEL = typer.Argument(
    metavar="MODEL",
    help="Name of a model (see 'adatsq-trt models'), folder of a diffusers pipeline or transformer, .safetensors file "
    "of a transformer, or hub id of a pipeline.",
    show_default=False,
)
Model = Annotated[str, _MODEL]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Run directory: results are kept, reused and resumed there.",
        show_default="runs/MODEL-TARGET",
    ),
]
_ALL = """Run all stages: from a model to TensorRT engines in a bundle.

Stages whose inputs have not changed are reused; an interrupted run goes on where it stopped.

Example: adatsq-trt build engine digits-flux --target sm120 -o runs/demo"""
_WHICH_MODEL = """Which model? For example:

  adatsq-trt {command} digits-flux                        one that ships with the package
  adatsq-trt {command} ./my-flux --prompts prompts.txt    a folder that diffusers saved
  adatsq-trt {command} black-forest-labs/FLUX.1-dev       a pipeline of the hub

Without --target it is for the GPU of this machine, or for sm120 where there is none. 'adatsq-trt models' lists the
models that ship, 'adatsq-trt {command} --help' all options."""
_UP_TO = """{about}

Runs the stages up to '{name}' with the options of 'build engine', which reuses them.

Example: adatsq-trt {name} digits-flux --target sm120 -o runs/demo"""


def _command(name: str, last: str, help: str) -> Callable[..., Path]:
    """The command that runs the stages up to one; it returns the run directory, for commands that call it."""

    def run(model: str | None, output: Path | None, **options: Any) -> Path:
        if model is None:
            _ask_for_a_model("build engine" if name == "engine" else name)
        return _run(last, model, output, options)

    parameters = [_parameter("model", Annotated[str | None, _MODEL], None)]
    for one, kind in choices():
        if not choice_of(one).in_python_only:
            parameters.append(_option(one, kind))
    parameters.insert(2, _parameter("output", Output, None))
    # Refused by a sentence that names what took their place.
    parameters += [_parameter(name, Annotated[str | None, typer.Option(hidden=True)], None) for name in RENAMED]
    run.__name__, run.__doc__ = name, help
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def _option(one: Field[Any], kind: Any) -> inspect.Parameter:
    """A field as an option."""
    choice, default = choice_of(one), one.default
    word = get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind
    if default == ():
        word, default = list[word], None  # type: ignore[valid-type]
    option = typer.Option(
        option_name(one.name),
        help=choice.help,
        show_default=choice.shown or True,
        metavar=choice.metavar,
        rich_help_panel=choice.group,
    )
    return _parameter(one.name, Annotated[word if default is not None else word | NoneType, option], default)


def _ask_for_a_model(command: str) -> NoReturn:
    """Say how to go on, and end as a mistake."""
    typer.echo(_WHICH_MODEL.format(command=command), err=True)
    raise typer.Exit(2)


def _run(last: str, model: str, output: Path | None, options: dict[str, Any]) -> Path:
    """Print the settings, run the stages, and print the figures at the end; returns the run directory."""
    from rich.console import Console

    from adatsq_trt import api
    from adatsq_trt.cli.progress import bars
    from adatsq_trt.cli.tables import settings_table
    from adatsq_trt.stages.duration import time_needed

    job = api.prepare(model, last, **{name: value for name, value in options.items() if value is not None})
    folder, console = output or _default_folder(job), Console()

    def begin(build: Build) -> None:
        console.print(settings_table(job.settings))
        console.print(f"{job.prepared.needs}\n{time_needed(build.outline, last)}", highlight=False, soft_wrap=True)

    with bars() as progress:
        result = job.run(folder, progress, on_begin=begin)
    if last == "search":
        _print_policy(result, job.settings, console)
    if last == "bundle":
        _print_bundle(result, console)
    console.print(f"{last}: {folder / last}", highlight=False, soft_wrap=True)
    if last == "bundle":
        for line in (result.summary.beside_uniform, f"next: adatsq-trt check {shlex.quote(str(folder))}"):
            console.print(line, highlight=False, soft_wrap=True)
    return folder


def _default_folder(job: Job) -> Path:
    """A simulated run gets a folder of its own, so that it never replaces a run with engines."""
    settings = job.settings
    names = [settings.model, *settings.targets, *(["simulated"] if settings.simulate else [])]
    return Path("runs") / "-".join(names)


def _print_policy(policy: Any, settings: Any, console: Any) -> None:
    """Print the costs of the searched policy beside those of simpler ones."""
    from adatsq_trt.cli.tables import limits_text, policies_table
    from adatsq_trt.report.summary import looser
    from adatsq_trt.stages.summary import policy_figures, replaced

    result, limit = policy.result, settings.max_assignments
    policies = policy_figures(result, limit)
    console.print(policies_table(policies, result.ms_source))
    console.print(limits_text(result.limits, settings.reference, limit), highlight=False, soft_wrap=True)
    parts = (part.sentence for part in (result.transform, replaced(result)) if part is not None)
    for remark in [*parts, *looser(policies)]:
        console.print(remark, highlight=False, soft_wrap=True)


def _print_bundle(bundle: Any, console: Any) -> None:
    """The figures of the build, the sizes of layouts, and what is left to do."""
    from adatsq_trt.cli.tables import size_table, summary_table
    from adatsq_trt.engines.backends.selection import compile_where_plans_run
    from adatsq_trt.engines.plugin_commands import COMMANDS_NAME
    from adatsq_trt.engines.sizes import size_report
    from adatsq_trt.formats import PLUGIN_LAYOUT

    console.print(summary_table(bundle.summary))
    if (report := size_report(bundle.files)) is not None:
        console.print(size_table(report))
    if (compiled := compile_where_plans_run(bundle.files)) is not None:
        console.print(compiled, highlight=False, markup=False, soft_wrap=True)
    if bundle.manifest.layout == PLUGIN_LAYOUT and not bundle.manifest.plans:
        commands = (bundle.path / COMMANDS_NAME).read_text(encoding="utf-8")
        console.print(commands, highlight=False, markup=False, soft_wrap=True)


engine = _command("engine", "bundle", _ALL)
calibrate, quantize, search, export = (
    _command(name, name, _UP_TO.format(about=about, name=name))
    for name, about in (
        ("calibrate", "Measure a model: trajectories, Fisher information, Hessians."),
        ("quantize", "Quantize every layer in every candidate format."),
        ("search", "Search the policy: a format for every step and layer."),
        ("export", "Write the policy's ONNX graphs."),
    )
)

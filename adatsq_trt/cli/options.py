"""From what the user asked for to resolved settings, and the stages run in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from adatsq_trt.errors import UserError
from adatsq_trt.formats import (
    TARGETS,
    default_budget,
    require_accelerated,
    require_shapes,
    resolve_formats,
    target_named,
)
from adatsq_trt.settings import SETTINGS_NAME, Settings

if TYPE_CHECKING:
    from adatsq_trt.cli.stages.context import Context
    from adatsq_trt.report.summary import Summary
    from adatsq_trt.zoo.loading import LoadedModel


class StageName(str, Enum):
    """The stages of a run, in order."""

    CALIBRATE = "calibrate"
    QUANTIZE = "quantize"
    SEARCH = "search"
    EXPORT = "export"
    BUNDLE = "bundle"


@dataclass(frozen=True)
class Request:
    """The command line's options; None stands for "the default"."""

    model: str
    targets: tuple[str, ...]
    output: Path | None
    formats: str | None
    budget_bits: float | None
    simulate: bool
    steps: int | None
    guidance: float | None
    policy: Path | None
    seed: int
    counts: Mapping[str, int]


def resolve(request: Request, model: LoadedModel, format_set: str) -> Settings:
    """Fill in the defaults.

    Raises:
        UserError: names, formats or shapes that do not go together.
    """
    formats = resolve_formats(format_set)
    if not request.simulate:
        require_accelerated(formats, [target_named(name) for name in request.targets])
    require_shapes(formats, [(n, layer.in_features) for n, layer in model.adapter.quantizable_layers().items()])
    return Settings(
        model=request.model,
        weights_sha256=model.weights_sha256,
        format_set=format_set,
        formats=tuple(fmt.name for fmt in formats),
        targets=request.targets,
        simulate=request.simulate,
        steps=request.steps or model.default_steps,
        guidance=model.default_guidance if request.guidance is None else request.guidance,
        budget_bits=default_budget(format_set) if request.budget_bits is None else request.budget_bits,
        policy=None if request.policy is None else request.policy.read_text(encoding="utf-8"),
        seed=request.seed,
        **request.counts,
    )


def _format_set(request: Request) -> str:
    """The set that was asked for, or the first target's."""
    for name in request.targets:
        target_named(name)
    if request.formats is not None:
        return request.formats
    if request.targets:
        return target_named(request.targets[0]).default_set
    if request.simulate:
        return "paper-fine"
    raise UserError(f"no --target: got none, expected one of {', '.join(TARGETS)}; or pass --simulate to build no plans")


def run_stages(request: Request, until: StageName) -> None:
    """Run the stages up to one, reusing what is done; print the settings first and the figures at the end."""
    format_set = _format_set(request)
    resolve_formats(format_set)
    if request.targets == () and not request.simulate:
        raise UserError(f"no --target: expected one of {', '.join(TARGETS)}; or pass --simulate to build no plans")
    from adatsq_trt.cli.stages import bundle, calibrate, export, quantize, search, summary
    from adatsq_trt.cli.stages.context import Context
    from adatsq_trt.files import write_json_model
    from adatsq_trt.run import RunDirectory
    from adatsq_trt.zoo.loading import load_model

    model = load_model(request.model)
    settings = resolve(request, model, format_set)
    search.require_possible(settings, model)
    console = Console()
    console.print(_settings_table(settings))
    output = request.output or Path("runs") / "-".join([request.model, *(request.targets or ("simulated",))])
    stages = {
        StageName.CALIBRATE: calibrate.run,
        StageName.QUANTIZE: quantize.run,
        StageName.SEARCH: search.run,
        StageName.EXPORT: export.run,
        StageName.BUNDLE: bundle.run,
    }
    with RunDirectory.open(output) as run:
        context = Context(run, settings, model)
        write_json_model(run.path / SETTINGS_NAME, settings)
        stages[until](context)
        if until is StageName.BUNDLE:
            console.print(summary_table(summary.write(context)))
    console.print(f"[bold]{output}[/bold] holds the result of '{until.value}'", highlight=False)


def until(stage: StageName, summary: str) -> Callable[..., None]:
    """The command that runs the stages up to one, with the options of `build engine`."""
    from adatsq_trt.cli.build import engine

    @functools.wraps(engine)
    def command(*args: Any, **kwargs: Any) -> None:
        engine(*args, **{**kwargs, "until": stage})

    command.__doc__, command.__name__ = summary, stage.value
    return command


def open_run(path: Path) -> Context:
    """A finished run, for reading.

    Raises:
        MissingFileError: there is no run directory, or it was never started.
        DamagedFileError: its settings are of another schema version.
    """
    from adatsq_trt.cli.stages.context import Context
    from adatsq_trt.files import read_json_model
    from adatsq_trt.run import RunDirectory
    from adatsq_trt.zoo.loading import load_model

    run = RunDirectory.existing(path)
    settings = read_json_model(run.path / SETTINGS_NAME, Settings)
    return Context(run, settings, load_model(settings.model))


def _settings_table(settings: Settings) -> Table:
    table = Table("setting", "value", box=None, title="settings", title_justify="left")
    for name, value in settings.model_dump().items():
        if name not in ("schema_version", "weights_sha256", "policy"):
            shown = ", ".join(value) if isinstance(value, tuple) else str(value)
            table.add_row(name, shown)
    return table


def summary_table(summary: Summary) -> Table:
    """The figures of a run beside those of simpler policies."""
    table = Table("policy", "mean bits", "latent MSE", "of the chosen", box=None)
    rows = [("chosen", f"{summary.mean_bits:.3f}", summary.final_error)]
    static = summary.static_errors
    rows += [
        (name, f"≤ {summary.budget_bits:g}", error)
        for name, error in (("best layer-only", static.layer_only), ("best time-only", static.time_only))
        if error is not None
    ]
    rows += [(f"uniform {name}", "", error) for name, error in summary.uniform_errors.items()]
    for name, bits, error in rows:
        table.add_row(name, bits, f"{error:.3e}", f"{error / summary.final_error:.2f} ×" if summary.final_error else "")
    table.caption = (
        f"{summary.buckets} buckets, {summary.assignments} distinct assignments; errors on {summary.held_out_samples} "
        f"held-out samples; {summary.denoiser_calls} denoiser calls; engines {summary.engine_bytes / 1e6:.1f} MB"
    )
    return table

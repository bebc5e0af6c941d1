"""From what the user asked for to resolved settings, and the stages run in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from adatsq_trt.cli.build import StageName
from adatsq_trt.errors import UserError
from adatsq_trt.formats import (
    TARGETS,
    Format,
    default_budget,
    require_accelerated,
    require_shapes,
    resolve_formats,
    target_named,
)
from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.zoo import find_model

if TYPE_CHECKING:
    from adatsq_trt.cli.stages.context import Context
    from adatsq_trt.engines.sizes import SizeReport
    from adatsq_trt.report.summary import Summary
    from adatsq_trt.zoo.loading import LoadedModel

SIMULATED_SET = "paper-fine"  # what --simulate without a target studies


@dataclass(frozen=True)
class Request:
    """The command line's options; None stands for "the default"."""

    model: str
    targets: tuple[str, ...]
    output: Path | None
    formats: str | None
    budget_bits: float | None
    simulate: bool
    layout: Literal["embedded", "shared", "switch"]
    steps: int | None
    guidance: float | None
    policy: Path | None
    seed: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """What can be told to be right or wrong before the model is loaded.

    Attributes:
        format_set: a set's name or a list of formats.
        formats: its members, cheapest first.
        budget_bits: largest mean of (weight bits + activation bits) / 2.
        policy: text of the given policy file.
    """

    format_set: str
    formats: tuple[Format, ...]
    budget_bits: float
    policy: str | None


def choose(request: Request) -> Choice:
    """Fill in the defaults that do not depend on the model.

    Raises:
        UserError: names, formats, targets, numbers or files that do not go together.
    """
    find_model(request.model)
    targets = [target_named(name) for name in request.targets]
    if not targets and not request.simulate:
        raise UserError(f"no --target: expected one of {', '.join(TARGETS)}; or pass --simulate to build no plans")
    format_set = request.formats or (targets[0].default_set if targets else SIMULATED_SET)
    formats = resolve_formats(format_set)
    if not request.simulate:
        require_accelerated(formats, targets)
    budget_bits = default_budget(format_set) if request.budget_bits is None else request.budget_bits
    _require_finite("--budget-bits", budget_bits)
    _require_finite("--guidance", request.guidance)
    return Choice(format_set, formats, budget_bits, _policy_text(request.policy))


def _require_finite(option: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise UserError(f"{option}: got {value}, expected a finite number; pass such a number or leave the option out")


def _policy_text(path: Path | None) -> str | None:
    """A policy file, read whole; whether it suits the model is the search's question."""
    if path is None:
        return None
    return Policy.load(path, GIVEN_POLICY_ADVICE).model_dump_json()


def resolve(request: Request, choice: Choice, model: LoadedModel) -> Settings:
    """Fill in the model's defaults.

    Raises:
        UserError: formats that do not suit the model's layers; a guidance scale for a model that takes none.
    """
    if request.guidance is not None and not model.adapter.takes_guidance:
        raise UserError(f"--guidance {request.guidance:g}: model '{request.model}' takes no guidance; leave it out")
    layers = model.adapter.quantizable_layers().items()
    require_shapes(choice.formats, [(name, layer.in_features) for name, layer in layers])
    return Settings(
        model=request.model,
        weights_sha256=model.weights_sha256,
        model_sha256=model.model_sha256,
        format_set=choice.format_set,
        formats=tuple(fmt.name for fmt in choice.formats),
        targets=request.targets,
        simulate=request.simulate,
        layout=request.layout,
        steps=request.steps or model.default_steps,
        guidance=model.default_guidance if request.guidance is None else request.guidance,
        budget_bits=choice.budget_bits,
        policy=choice.policy,
        seed=request.seed,
        **request.counts,
    )


def run_stages(request: Request, until: StageName) -> None:
    """Run the stages up to one, reusing what is done; print the settings first and the figures at the end."""
    choice = choose(request)
    from adatsq_trt.cli.stages import bundle, calibrate, export, quantize, search, summary
    from adatsq_trt.cli.stages.context import Context
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.sizes import size_report
    from adatsq_trt.files import write_json_model
    from adatsq_trt.run import RunDirectory
    from adatsq_trt.zoo.loading import load_model

    model = load_model(request.model)
    settings = resolve(request, choice, model)
    search.require_possible(settings, model)
    console = Console()
    # A simulated run gets a folder of its own, so that it never replaces a run with engines.
    names = [request.model, *request.targets, *(["simulated"] if request.simulate else [])]
    output = request.output or Path("runs") / "-".join(names)
    stages = {
        StageName.CALIBRATE: calibrate.run,
        StageName.QUANTIZE: quantize.run,
        StageName.SEARCH: search.run,
        StageName.EXPORT: export.run,
        StageName.BUNDLE: bundle.run,
    }
    with RunDirectory.open(output) as run:
        console.print(_settings_table(settings))
        context = Context(run, settings, model)
        write_json_model(run.path / SETTINGS_NAME, settings)
        result = stages[until](context).folder
        if until is StageName.BUNDLE:
            console.print(summary_table(summary.write(context)))
            report = size_report(BundleFiles.open(result, verify=False))
            if report is not None:
                console.print(size_table(report))
    console.print(f"{until.value}: {output / result.name}", highlight=False, soft_wrap=True)


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
        if name not in ("schema_version", "weights_sha256", "model_sha256", "policy"):
            shown = ", ".join(value) if isinstance(value, tuple) else str(value)
            table.add_row(name, shown)
    return table


def summary_table(summary: Summary) -> Table:
    """The figures of a run beside those of simpler policies."""
    from adatsq_trt.report.numbers import ratio

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
        spread = f" ± {summary.final_standard_error:.0e}" if name == "chosen" else ""
        times = ratio(error / summary.final_error) if summary.final_error else ""
        table.add_row(name, bits, f"{error:.3e}{spread}", times)
    table.caption = (
        f"{summary.buckets} buckets, {summary.assignments} distinct assignments; errors on {summary.held_out_samples} "
        f"held-out samples; {summary.denoiser_calls} denoiser calls; engines {summary.engine_bytes / 1e6:.1f} MB"
    )
    return table


def size_table(report: SizeReport) -> Table:
    """Bytes of every layout beside the least that the policy needs; the plans of the one that is built."""
    table = Table("layout", "engines", "weights", "of the least", "plans beside weights", box=None)
    for row in report.layouts:
        code = ", ".join(f"{target} {size / 1e6:.1f} MB" for target, size in row.plan_overhead_bytes.items())
        ratio = f"{row.weight_bytes / report.floor_bytes:.2f} ×"
        table.add_row(row.layout, str(row.engines), f"{row.weight_bytes / 1e6:.1f} MB", ratio, code or "not built")
    table.caption = (
        f"the least: {report.floor_bytes / 1e6:.1f} MB, every (layer, format) and the rest of the model once"
    )
    return table

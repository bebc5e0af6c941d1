"""From what the user asked for to resolved settings, and the stages run in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from adatsq_trt.cli.budgets import BudgetChoice, BudgetRequest, choose_budgets, parse_bytes, require_finite
from adatsq_trt.cli.build import StageName
from adatsq_trt.cli.loading import ModelRequest, OpenedModel, open_model, reopen_model, require_model
from adatsq_trt.cli.shapes import Shape, open_at_first, parse_shapes, resolve_shapes, written
from adatsq_trt.errors import MissingFileError, UserError
from adatsq_trt.execution import InProcess, Workers
from adatsq_trt.execution.cluster import connected, parse_address, require_cluster
from adatsq_trt.execution.device import AUTO, CPU, OnDevice, parse_device
from adatsq_trt.formats import (
    PLUGIN_LAYOUT,
    TARGETS,
    Format,
    Target,
    require_accelerated,
    require_shapes,
    resolve_formats,
    target_named,
)
from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
from adatsq_trt.settings import SETTINGS_NAME, Settings

if TYPE_CHECKING:
    from adatsq_trt.engines.sizes import SizeReport
    from adatsq_trt.report.summary import Summary
    from adatsq_trt.stages.context import Context

SIMULATED_SET = "paper-fine"  # what --simulate without a target studies
PLUGIN_TARGET = "sm90"  # of layout `plugin` without a target: its graph is the same for all


@dataclass(frozen=True)
class FormatRequest:
    """The candidates, what happens to weights and inputs before they are rounded, and whether none need be fast."""

    names: str | None
    transform: str | None = None
    simulate: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """How plans are arranged, what compiles them, and what enterprise TensorRT is to make of them."""

    layout: Literal["embedded", "shared", "switch", "plugin"]
    backend: Literal["rtx", "tensorrt"]
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"]
    version_compatible: bool
    weight_streaming: bool
    batch: list[int] | None
    shapes: str | None


@dataclass(frozen=True)
class PlaceRequest:
    """Where results go, how much memory making them may take, and who computes.

    Attributes:
        output: the run directory.
        memory_limit: of this process.
        ray: a Ray cluster's address; None for this process.
        device: that this process computes on.
    """

    output: Path | None
    memory_limit: str | None = None
    ray: str | None = None
    device: str = AUTO

    @property
    def limit_bytes(self) -> int | None:
        """Of memory; None for what the machine has.

        Raises:
            UserError: not a size.
        """
        return None if self.memory_limit is None else int(parse_bytes(self.memory_limit, "--memory-limit"))


@dataclass(frozen=True)
class Request:
    """The command line's options; None stands for "the default"."""

    model: ModelRequest
    targets: tuple[str, ...]
    place: PlaceRequest
    formats: FormatRequest
    budgets: BudgetRequest
    compiler: PlanRequest
    policy: Path | None
    given: Mapping[str, int | str]


@dataclass(frozen=True)
class Choice:
    """What can be told to be right or wrong before the model is loaded.

    Attributes:
        targets: names of the targets.
        format_set: a set's name or a list of formats.
        formats: its members, cheapest first.
        budgets: what the policy may spend.
        policy: text of the given policy file.
        memory_limit: most resident bytes; None for all that the machine has.
        shapes: samples and sizes of optimization profiles; none for the model's own size.
    """

    targets: tuple[str, ...]
    format_set: str
    formats: tuple[Format, ...]
    budgets: BudgetChoice
    policy: str | None
    memory_limit: int | None
    shapes: tuple[Shape, ...]


def choose(request: Request) -> Choice:
    """Fill in the defaults that do not depend on the model.

    Raises:
        UserError: names, formats, targets, numbers or files that do not go together.
    """
    require_model(request.model)
    names = request.targets
    if request.compiler.layout == PLUGIN_LAYOUT:
        names = names or (PLUGIN_TARGET,)
        if request.formats.simulate:
            raise UserError("--layout plugin: --simulate builds nothing that has a layout; leave one of them out")
    targets = [target_named(name) for name in names]
    if not targets and not request.formats.simulate:
        raise UserError(f"no --target: expected one of {', '.join(TARGETS)}; or pass --simulate to build no plans")
    format_set = request.formats.names or (targets[0].default_set if targets else SIMULATED_SET)
    formats = resolve_formats(format_set)
    if not request.formats.simulate:
        require_accelerated(formats, targets, request.compiler.layout, request.compiler.backend)
    _require_backend(request, targets)
    budgets = choose_budgets(request.budgets, format_set)
    require_finite("--guidance", request.model.guidance)
    shapes = () if request.compiler.shapes is None else parse_shapes(request.compiler.shapes)
    if shapes and request.compiler.batch:
        raise UserError("--batch: --shapes says how many samples of each size; leave one of them out")
    policy = _policy_text(request.policy)
    return Choice(names, format_set, formats, budgets, policy, request.place.limit_bytes, shapes)


def _require_backend(request: Request, targets: Sequence[Target]) -> None:
    """Refuse, before anything runs, options of another backend, and plans that this machine cannot compile.

    Raises:
        UserError: options that do not go together; no such library, GPU or target here.
    """
    special = {
        "--hardware-compatibility": request.compiler.hardware_compatibility != "none",
        "--version-compatible": request.compiler.version_compatible,
        "--weight-streaming": request.compiler.weight_streaming,
    }
    if request.compiler.backend != "tensorrt":
        given = [option for option, is_given in special.items() if is_given]
        if given:
            raise UserError(
                f"{', '.join(given)}: only enterprise TensorRT has this; add --backend tensorrt or leave it out"
            )
        return
    if request.compiler.layout == PLUGIN_LAYOUT or request.formats.simulate:
        raise UserError("--backend tensorrt: this request compiles no plans; leave it out")
    from adatsq_trt.engines.backends.tensorrt import TensorRTBackend, TensorRTOptions
    from adatsq_trt.engines.manifest import Compatibility

    compatibility = Compatibility(
        hardware=request.compiler.hardware_compatibility, versions=request.compiler.version_compatible
    )
    backend = TensorRTBackend(TensorRTOptions(compatibility))
    backend.require()
    for target in targets:
        if target.compute_capability is not None:
            backend.require_target(target)


def _require_exportable(request: Request, until: StageName) -> None:
    """No graph holds a transform yet, so nothing that was made with one may reach the export."""
    if request.formats.transform is None:
        return
    if not request.formats.simulate:
        raise UserError(
            f"--transform {request.formats.transform}: exported graphs cannot hold it; pass --simulate to study it"
        )
    if until in (StageName.EXPORT, StageName.BUNDLE):
        raise UserError(
            f"--transform {request.formats.transform}: exported graphs cannot hold it; run 'adatsq-trt search' with "
            "these options, which ends before the export"
        )


def _policy_text(path: Path | None) -> str | None:
    """A policy file, read whole; whether it suits the model is the search's question."""
    if path is None:
        return None
    return Policy.load(path, GIVEN_POLICY_ADVICE).model_dump_json()


def resolve(request: Request, choice: Choice, opened: OpenedModel) -> Settings:
    """Fill in the model's defaults.

    Raises:
        UserError: formats that do not suit the model's layers; a guidance scale for a model that takes none.
    """
    model = opened.outline
    unguided = opened.settings is not None and request.model.guidance == 1.0
    if request.model.guidance is not None and not model.adapter.takes_guidance and not unguided:
        raise UserError(f"--guidance {request.model.guidance:g}: model '{model.name}' takes no guidance; leave it out")
    shapes: tuple[Shape, ...] = resolve_shapes(choice.shapes, model)
    batch = tuple(sorted(set(request.compiler.batch or ())))
    if len({shape[1:] for shape in shapes}) == 1:  # of the model's own size, which --batch is for
        batch, shapes = tuple(shape[0] for shape in shapes), ()
    compiler = asdict(request.compiler) | {"batch": batch, "shapes": shapes}
    layers = model.adapter.quantizable_layers().items()
    require_shapes(choice.formats, [(name, layer.in_features) for name, layer in layers])
    return Settings(
        model=model.name,
        pipeline=opened.settings,
        weights_sha256=model.weights_sha256,
        model_sha256=model.model_sha256,
        format_set=choice.format_set,
        formats=tuple(fmt.name for fmt in choice.formats),
        targets=choice.targets,
        simulate=request.formats.simulate,
        **{name: value for name, value in compiler.items() if value != ()},
        guidance=model.default_guidance if request.model.guidance is None else request.model.guidance,
        budget_bits=choice.budgets.bits,
        budget_bytes=choice.budgets.bytes,
        budget_ms=choice.budgets.ms,
        times=choice.budgets.times,
        policy=choice.policy,
        transform=request.formats.transform,
        **{"steps": model.default_steps, **request.given},
    )


def choose_workers(place: PlaceRequest) -> AbstractContextManager[Workers]:
    """Who computes: a Ray cluster's processors, a GPU, or this machine's processors.

    Raises:
        UserError: a device or a cluster that is not there, or one of each.
    """
    if place.ray is not None:
        address = parse_address(place.ray)
        if place.device not in (AUTO, CPU):
            raise UserError(
                f"--device {place.device}: with --ray the workers' processors compute; leave out one of them"
            )
        require_cluster(address)
        return connected(address)
    device = parse_device(place.device)
    return nullcontext(InProcess() if device.type == CPU else OnDevice(device))


def _exported(outline: Context, opened: OpenedModel) -> bool:
    """Whether all that needs the model's weights is done, so that they need not be loaded."""
    from adatsq_trt.stages import calibrate, embed, export, quantize, search

    if opened.pipeline is not None and not embed.stage(outline.run, opened.pipeline).done:
        return False
    try:
        return all(module.stage(outline).done for module in (calibrate, quantize, search, export))
    except MissingFileError:  # what an earlier stage has not written yet
        return False


def run_stages(request: Request, until: StageName) -> None:
    """Run the stages up to one, reusing what is done; print the settings first and the figures at the end."""
    choice = choose(request)
    _require_exportable(request, until)
    chosen_workers = choose_workers(request.place)
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.plugin_commands import COMMANDS_NAME
    from adatsq_trt.engines.sizes import size_report
    from adatsq_trt.files import write_json_model
    from adatsq_trt.stages import bundle, calibrate, export, quantize, search, summary
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.memory import plan_memory
    from adatsq_trt.stages.meter import release_memory
    from adatsq_trt.stages.run_directory import RunDirectory

    opened = open_model(open_at_first(request.model, choice.shapes))
    settings = resolve(request, choice, opened)
    search.require_possible(settings, opened.outline)
    memory = plan_memory(choice.memory_limit, settings, opened.outline, opened.pipeline, until.value)
    console = Console()
    # A simulated run gets a folder of its own, so that it never replaces a run with engines.
    names = [settings.model, *choice.targets, *(["simulated"] if request.formats.simulate else [])]
    output = request.place.output or Path("runs") / "-".join(names)
    stages = {
        StageName.CALIBRATE: calibrate.run,
        StageName.QUANTIZE: quantize.run,
        StageName.SEARCH: search.run,
        StageName.EXPORT: export.run,
        StageName.BUNDLE: bundle.run,
    }
    with chosen_workers as workers, RunDirectory.open(output) as run:
        console.print(_settings_table(settings))
        write_json_model(run.path / SETTINGS_NAME, settings)
        outline = Context(run, settings, opened.outline, memory, workers)
        if until is StageName.BUNDLE and settings.times is None:
            if not _exported(outline, opened):
                export.run(Context(run, settings, opened.load(run), memory, workers))
                release_memory()  # compilers need that of the weights
            context = outline
            result = bundle.build(context).folder
        else:
            context = Context(run, settings, opened.load(run), memory, workers)
            result = stages[until](context).folder
        if until is StageName.BUNDLE:
            console.print(summary_table(summary.write(context)))
            report = size_report(BundleFiles.open(result, verify=False))
            if report is not None:
                console.print(size_table(report))
            if settings.layout == PLUGIN_LAYOUT:
                commands = (result / COMMANDS_NAME).read_text(encoding="utf-8")
                console.print(commands, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{until.value}: {output / result.name}", highlight=False, soft_wrap=True)


def open_run(path: Path) -> Context:
    """A finished run, for reading.

    Raises:
        MissingFileError: there is no run directory, or it was never started.
        DamagedFileError: its settings are of another schema version.
    """
    from adatsq_trt.files import read_json_model
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.run_directory import RunDirectory

    run = RunDirectory.existing(path)
    settings = read_json_model(run.path / SETTINGS_NAME, Settings)
    return Context(run, settings, reopen_model(settings, run))


_NOT_SHOWN = {"schema_version", "weights_sha256", "model_sha256", "policy", "pipeline", "times"}


def _settings_table(settings: Settings) -> Table:
    table = Table("setting", "value", box=None, title="settings", title_justify="left")
    values = settings.model_dump(exclude=_NOT_SHOWN)
    if settings.pipeline is not None:
        values |= settings.pipeline.model_dump(exclude={"prompts"}) | {"prompts": len(settings.pipeline.prompts)}
    for name, value in values.items():
        value = tuple(map(written, value)) if name == "shapes" else value
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return table


def summary_table(summary: Summary) -> Table:
    """The figures of a run beside those of simpler policies."""
    from adatsq_trt.report.numbers import ratio

    table = Table("policy", "mean bits", "latent MSE", "of the chosen", box=None)
    rows = [("chosen", f"{summary.mean_bits:.3f}", summary.final_error)]
    static = summary.static_errors
    rows += [
        (name, "" if summary.budget_bits is None else f"≤ {summary.budget_bits:g}", error)
        for name, error in (("best layer-only", static.layer_only), ("best time-only", static.time_only))
        if error is not None
    ]
    if summary.unlimited is not None:
        rows.append((f"without --max-assignments: {summary.unlimited.assignments}", "", summary.unlimited.error))
    rows += [(f"uniform {name}", "", error) for name, error in summary.uniform_errors.items()]
    for name, bits, error in rows:
        spread = f" ± {summary.final_standard_error:.0e}" if name == "chosen" else ""
        times = ratio(error / summary.final_error) if summary.final_error else ""
        table.add_row(name, bits, f"{error:.3e}{spread}", times)
    table.caption = (
        f"{summary.buckets} buckets, {summary.assignments} distinct assignments; errors on {summary.held_out_samples} "
        f"held-out samples; {summary.denoiser_calls} denoiser calls; engines {summary.engine_bytes / 1e6:.1f} MB"
    )
    if summary.budget_bytes is not None:
        resident, most = summary.resident_weight_bytes / 1e6, summary.budget_bytes / 1e6
        table.caption += f"\nquantized weights {resident:.4g} MB of a budget of {most:.4g} MB"
    if summary.budget_ms is not None:
        table.caption += (
            f"\n{summary.ms:.4g} ms per sample of a budget of {summary.budget_ms:g} ms: {summary.ms_source}"
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
    if report.operands:
        parts = [f"{o.name} {o.bytes / 1e3:.1f} kB in {o.layers} layers" for o in report.operands]
        table.caption += f"\ninputs of plugin nodes: {', '.join(parts)}"
    return table

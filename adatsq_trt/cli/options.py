"""From what the user asked for to resolved settings, and the stages run in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from adatsq_trt.base_type import require_one_type
from adatsq_trt.cli.budgets import BudgetChoice, BudgetRequest, choose_budgets, parse_bytes, require_finite
from adatsq_trt.cli.build import StageName
from adatsq_trt.cli.loading import ModelRequest, OpenedModel, open_model, reopen_model, require_model
from adatsq_trt.cli.shapes import Shape, open_at_first, parse_shapes, require_sides, resolve_shapes, written
from adatsq_trt.cli.tables import settings_table, size_table, summary_table
from adatsq_trt.errors import MissingFileError, UserError
from adatsq_trt.execution import InProcess, Workers
from adatsq_trt.execution.cluster import connected, parse_address, require_cluster
from adatsq_trt.execution.device import AUTO, CPU, OnDevice, parse_device
from adatsq_trt.formats import (
    FORMATS,
    PLUGIN_LAYOUT,
    TARGETS,
    Format,
    Target,
    default_formats,
    require_accelerated,
    require_shapes,
    resolve_formats,
    target_named,
)
from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
from adatsq_trt.settings import SETTINGS_NAME, Settings

if TYPE_CHECKING:
    from torch import nn

    from adatsq_trt.stages.context import Context
    from adatsq_trt.zoo.loading import LoadedModel

SIMULATED_SET = "paper-fine"  # what --simulate without a target studies
MOST_GUIDANCE = 1000  # far beyond what any model is used with
DEFAULT_LAYOUT: Literal["embedded"] = "embedded"
PLUGIN_TARGET = "sm90"  # of layout `plugin` without a target: its graph is the same for all


@dataclass(frozen=True)
class FormatRequest:
    """The candidates, what happens to weights and inputs before they are rounded, and whether none need be fast."""

    names: str | None
    transform: str | None = None
    simulate: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """How plans are arranged (None: as by default), what compiles them, and what enterprise TensorRT makes of them."""

    layout: Literal["embedded", "shared", "switch", "plugin"] | None
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
    require_sides(request.model.height, request.model.width, request.model.frames)
    names = request.targets
    if request.compiler.layout == PLUGIN_LAYOUT:
        names = names or (PLUGIN_TARGET,)
    targets = [target_named(name) for name in names]
    if not targets and not request.formats.simulate:
        raise UserError(f"no --target: expected one of {', '.join(TARGETS)}; or pass --simulate to build no plans")
    _require_layout(request, targets)
    layout, backend = request.compiler.layout or DEFAULT_LAYOUT, request.compiler.backend
    own = default_formats(targets, layout, backend) if targets and not request.formats.simulate else None
    format_set = request.formats.names or own or (targets[0].default_set if targets else SIMULATED_SET)
    formats = resolve_formats(format_set)
    require_one_type(fmt.name for fmt in formats)
    if not request.formats.simulate:
        require_accelerated(formats, targets, layout, backend)
    _require_backend(request, targets)
    budgets = choose_budgets(request.budgets, format_set)
    _require_guidance(request.model.guidance)
    shapes = () if request.compiler.shapes is None else parse_shapes(request.compiler.shapes)
    if shapes and request.compiler.batch:
        raise UserError("--batch: --shapes says how many samples of each size; leave one of them out")
    policy = _policy_text(request.policy)
    return Choice(names, format_set, formats, budgets, policy, request.place.limit_bytes, shapes)


def _require_guidance(guidance: float | None) -> None:
    """Refuse a scale at which 16-bit numbers, or any, overflow.

    Raises:
        UserError: says what was given.
    """
    require_finite("--guidance", guidance)
    if guidance is not None and abs(guidance) > MOST_GUIDANCE:
        raise UserError(
            f"--guidance {guidance:g}: expected a number from -{MOST_GUIDANCE} to {MOST_GUIDANCE}; pass such a number "
            "or leave the option out"
        )


def _require_layout(request: Request, targets: Sequence[Target]) -> None:
    """Refuse a layout where there are no plans.

    Raises:
        UserError: says why there are none.
    """
    layout = request.compiler.layout
    if layout is None:
        return
    if request.formats.simulate:
        raise UserError(f"--layout {layout}: --simulate builds nothing that has a layout; leave one of them out")
    if all(target.compute_capability is None for target in targets):
        raise UserError(
            f"--layout {layout}: target 'cpu' runs graphs, not plans, so nothing of it has a layout; leave it out or "
            "add a GPU with --target"
        )


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
    layout = request.compiler.layout or DEFAULT_LAYOUT
    compiler = asdict(request.compiler) | {"batch": batch, "shapes": shapes, "layout": layout}
    _require_size(model)
    _require_layers(request, choice, model.adapter.quantizable_layers())
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


def _require_size(model: LoadedModel) -> None:
    """Refuse a size that no bundle may have, before anything of that size is made.

    Raises:
        UserError: says how large a latent would be.
    """
    from adatsq_trt.engines.manifest import MAX_LATENT_ELEMENTS

    if (elements := model.adapter.image.elements) > MAX_LATENT_ELEMENTS:
        raise UserError(
            f"size {written(model.scale.size(model.adapter.image))}: a latent has {elements} elements, the most is "
            f"{MAX_LATENT_ELEMENTS}; choose smaller numbers with --height, --width and --frames"
        )


def _require_layers(request: Request, choice: Choice, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse formats and layouts that do not suit a layer, before anything runs.

    Raises:
        UnsupportedFormatError: names the layer, and the formats that suit all.
    """
    compiler, layout = request.compiler, request.compiler.layout or DEFAULT_LAYOUT
    targets = [] if request.formats.simulate else [target_named(name) for name in choice.targets]
    require_shapes(
        choice.formats,
        [(name, layer.in_features) for name, layer in layers.items()],
        set(FORMATS).intersection(*(target.accelerated(layout, compiler.backend) for target in targets)),
        whole_groups=bool(targets) and (layout == PLUGIN_LAYOUT or compiler.backend == "tensorrt"),
    )
    if layout == PLUGIN_LAYOUT:
        from adatsq_trt.export.plugin_operands import require_plugin_shapes

        require_plugin_shapes({name: (layer.out_features, layer.in_features) for name, layer in layers.items()})


def _drawn(request: Request) -> int:
    """Samples of the largest batch; each batch draws the first prompts in turn."""
    names = ("calibration_samples", "selection_samples", "held_out_samples")
    return max(int(request.given.get(name, Settings.model_fields[name].default)) for name in names)


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

    opened = open_model(open_at_first(request.model, choice.shapes), _drawn(request))
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
        console.print(settings_table(settings))
        write_json_model(run.path / SETTINGS_NAME, settings)
        outline = Context(run, settings, opened.outline, memory, workers)
        if until is StageName.BUNDLE and settings.times is None:
            if not _exported(outline, opened):
                export.run(Context(run, settings, opened.load(run, settings), memory, workers))
                release_memory()  # compilers need that of the weights
            context = outline
            result = bundle.build(context).folder
        else:
            context = Context(run, settings, opened.load(run, settings), memory, workers)
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

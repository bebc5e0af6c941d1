"""From what the user asked for to a model that was checked and the settings of its run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatsq_trt.base_type import require_one_type
from adatsq_trt.calibration.transforms.graph_form import rotated_blocks
from adatsq_trt.calibration.transforms.make import TRANSFORMS
from adatsq_trt.config import DEFAULT_LAYOUT, BuildConfig, Layout, Weights
from adatsq_trt.engines.backends.cuda_device import gpu_capability
from adatsq_trt.errors import DependencyError, UnsupportedFormatError, UserError
from adatsq_trt.execution import Executor, InProcess
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
from adatsq_trt.settings import Settings
from adatsq_trt.stages.budget_options import budget_settings, size_settings
from adatsq_trt.stages.context import layer_shapes
from adatsq_trt.stages.experts import require_for_experts
from adatsq_trt.stages.lora_slots import require_slots
from adatsq_trt.stages.models import OpenedModel, exclude_layers, open_model, restrict_formats
from adatsq_trt.stages.shapes import Shape, at_first, parse_shapes, resolve_shapes, written
from adatsq_trt.stages.steps import step_settings

if TYPE_CHECKING:
    from torch import nn

    from adatsq_trt.zoo.loading import LoadedModel

LOGGER = logging.getLogger(__name__)
DEFAULT_TARGET = "sm120"  # where nobody says what to build for and there is no GPU
# What --simulate without a target studies.
SIMULATED_SETS: dict[Weights, str] = {"once": "grid", "free": "paper-fine"}
PLUGIN_TARGET = "sm90"  # of layout `plugin` without a target: its graph is the same for all
# Choices that are settings as they are.
_GIVEN = (
    *("simulate", "backend", "hardware_compatibility", "version_compatible", "weight_streaming"),
    *("transform", "lora_slots", "clips", "refine", "weights", "seed", "calibration_samples", "projections"),
    *("selection_samples", "held_out_samples", "hessian"),
    *("temperature", "damping", "beam", "candidates", "slack", "expansions", "search_precision"),
)


def open_and_resolve(model: object, config: BuildConfig, last: str) -> tuple[OpenedModel, Settings]:
    """Check what was asked for, then the model, which `require_model` let pass, and fill in the defaults.

    Args:
        model: name of a model of the zoo; else a path, a hub id, or a pipeline or transformer in memory.
        config: choices of the build.
        last: the last stage that is to run.

    Raises:
        UserError: names, formats, targets, numbers or files that do not go together, or do not suit the model.
    """
    targets = _targets(config)
    layout = config.layout or DEFAULT_LAYOUT
    asks = config.formats is None and not config.simulate
    own = default_formats(targets, layout, config.backend) if targets and asks else None
    format_set = config.formats or own or (targets[0].default_set if targets else SIMULATED_SETS[config.weights])
    formats = resolve_formats(format_set)
    require_one_type(fmt.name for fmt in formats)
    if not config.simulate:
        require_accelerated(formats, targets, layout, config.backend)
    _require_backend(config, targets)
    known = budget_settings(config, targets, layout, format_set, formats) | {"policy": _policy_text(config.policy)}
    shapes = () if config.shapes is None else parse_shapes(config.shapes)
    if shapes and config.batches:
        raise UserError("--batch: --shapes says how many samples of each size; leave one of them out")
    _ = config.limit_bytes  # refused here if it is none
    _require_exportable(config, last)
    opened = open_model(model, at_first(config))
    settings = _resolve(config, opened, targets, format_set, formats, shapes, known)
    if targets and not config.targets and config.layout != PLUGIN_LAYOUT:
        LOGGER.info("no --target: the target is %s", targets[0].name)
    return opened, settings


def _targets(config: BuildConfig) -> list[Target]:
    names = config.targets
    if config.layout == PLUGIN_LAYOUT:
        names = names or (PLUGIN_TARGET,)
    if not names and not config.simulate:
        names = (_target_of_this_machine(),)
    targets = [target_named(name) for name in names]
    _require_layout(config, targets)
    return targets


def _target_of_this_machine() -> str:
    """The target of the GPU that is here; the newest where there is none.

    Raises:
        UserError: no plans can be built for the GPU that is here.
    """
    try:
        capability = gpu_capability()
    except DependencyError:
        return DEFAULT_TARGET
    name = f"sm{capability}"
    if name not in TARGETS or not TARGETS[name].formats:
        able = ", ".join(target.name for target in TARGETS.values() if target.formats)
        raise UserError(
            f"no --target: the GPU here is {name}, expected one of {able}; choose one with --target, or pass "
            f"--layout {PLUGIN_LAYOUT} or --simulate"
        )
    return name


def _require_layout(config: BuildConfig, targets: Sequence[Target]) -> None:
    """Refuse a layout where there are no plans.

    Raises:
        UserError: says why there are none.
    """
    if config.layout is None:
        return
    if config.simulate:
        raise UserError(f"--layout {config.layout}: --simulate builds nothing that has a layout; leave one of them out")
    if all(target.compute_capability is None for target in targets):
        raise UserError(
            f"--layout {config.layout}: target 'cpu' runs graphs, not plans, so nothing of it has a layout; leave it "
            "out or add a GPU with --target"
        )


def _layout(config: BuildConfig, targets: Sequence[Target], formats: Sequence[Format]) -> Layout:
    """The layout: where none is asked for and formats share a weight, one whose plans share it too."""
    if config.layout is not None:
        return config.layout
    grids = [fmt.weight for fmt in formats if not fmt.weight.is_float]
    compiled = config.backend == "rtx" and not config.simulate
    plans = compiled and any(target.compute_capability is not None for target in targets)
    return "shared" if plans and len(set(grids)) < len(grids) else DEFAULT_LAYOUT


def _require_backend(config: BuildConfig, targets: Sequence[Target]) -> None:
    """Refuse, before anything runs, options of another backend, and plans that this machine cannot compile.

    Raises:
        UserError: options that do not go together; no such library, GPU or target here.
    """
    special = {
        "--hardware-compatibility": config.hardware_compatibility != "none",
        "--version-compatible": config.version_compatible,
        "--weight-streaming": config.weight_streaming,
        "--plugins": config.plugins is not None,
    }
    if config.backend != "tensorrt":
        given = [option for option, is_given in special.items() if is_given]
        if given:
            raise UserError(
                f"{', '.join(given)}: only enterprise TensorRT has this; add --backend tensorrt or leave it out"
            )
        return
    if config.simulate:
        raise UserError("--backend tensorrt: this request compiles no plans; leave it out")
    _require_plugins(config)
    from adatsq_trt.engines.backends.tensorrt import TensorRTBackend, TensorRTOptions
    from adatsq_trt.engines.manifest import Compatibility

    compatibility = Compatibility(hardware=config.hardware_compatibility, versions=config.version_compatible)
    backend = TensorRTBackend(TensorRTOptions(compatibility))
    backend.require()
    for target in targets:
        if target.compute_capability is not None:
            backend.require_target(target)


def _require_plugins(config: BuildConfig) -> None:
    """Refuse a plan of plugin nodes without the library, and the library without such a plan."""
    if config.layout != PLUGIN_LAYOUT and config.plugins is not None:
        raise UserError("--plugins: only plans of --layout plugin need the library; leave it out")
    if config.layout == PLUGIN_LAYOUT and (config.plugins is None or not config.plugins.is_file()):
        got = "no --plugins" if config.plugins is None else f"no file '{config.plugins}'"
        raise UserError(
            f"--backend tensorrt with --layout plugin: got {got}, expected the libadatsq_plugins.so that 'adatsq-trt "
            "build plugins' makes; or leave --backend out, and the bundle gets commands that compile its plan elsewhere"
        )


def _require_exportable(config: BuildConfig, last: str) -> None:
    """Simulated transforms are not those of graphs, and shared planes are not solved again."""
    if config.refine and config.layout == PLUGIN_LAYOUT:
        raise UserError(
            "--refine: with --layout plugin widths of a layer may share planes, which are not solved again; choose "
            "another layout, or leave it out"
        )
    if config.transform is not None and config.simulate and last in ("export", "bundle"):
        raise UserError(
            f"--transform {config.transform}: with --simulate inputs are rotated as a whole and divided by any number, "
            "which exported graphs do not hold; run 'adatsq-trt search' with these options, which ends before the "
            "export, or leave out --simulate"
        )


def _policy_text(policy: Path | str | Policy | None) -> str | None:
    """A policy, read whole; whether it suits the model is the search's question."""
    if policy is None:
        return None
    given = policy if isinstance(policy, Policy) else Policy.load(Path(policy), GIVEN_POLICY_ADVICE)
    return given.model_dump_json()


def _resolve(
    config: BuildConfig,
    opened: OpenedModel,
    targets: Sequence[Target],
    format_set: str,
    formats: Sequence[Format],
    asked: tuple[Shape, ...],
    known: dict[str, Any],
) -> Settings:
    """Fill in the model's defaults."""
    model = opened.outline
    unguided = opened.settings is not None and config.guidance == 1.0
    if config.guidance is not None and not model.adapter.takes_guidance and not unguided:
        raise UserError(f"--guidance {config.guidance:g}: model '{model.name}' takes no guidance; leave it out")
    require_for_experts(config, model, shapes=bool(asked))
    require_slots(config, opened, shapes=bool(asked))
    shapes: tuple[Shape, ...] = resolve_shapes(asked, model)
    batch = config.batches
    if len({shape[1:] for shape in shapes}) == 1:  # of the model's own size, which --batch is for
        batch, shapes = tuple(shape[0] for shape in shapes), ()
    excluded = exclude_layers(model, config.excludes)
    _require_size(model)
    layers = model.adapter.quantizable_layers()
    _require_layers(config, targets, formats, layers)
    shapes_of_one_row = layer_shapes(model.adapter, dict.fromkeys(layers, 1))
    return Settings(
        **{name: getattr(config, name) for name in _GIVEN}
        | {"layout": _layout(config, targets, formats)}
        | known
        | size_settings(config, shapes_of_one_row)
        | ({"batch": batch} if batch else {})
        | {"shapes": shapes}
        | step_settings(config, opened)
        | ({} if config.plugins is None else {"plugins": str(config.plugins.absolute())}),
        excluded=excluded,
        formats_for=restrict_formats(model, config.restrictions, [fmt.name for fmt in formats]),
        model=model.name,
        pipeline=opened.settings,
        weights_sha256=model.weights_sha256,
        model_sha256=model.model_sha256,
        format_set=format_set,
        formats=tuple(fmt.name for fmt in formats),
        targets=tuple(target.name for target in targets),
        guidance=model.default_guidance if config.guidance is None else config.guidance,
        guidance_2=config.guidance_2,
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


def _require_layers(
    config: BuildConfig, targets: Sequence[Target], formats: Sequence[Format], layers: Mapping[str, nn.Linear]
) -> None:
    """Refuse formats and layouts that do not suit a layer, before anything runs.

    Raises:
        UnsupportedFormatError: names the layer, and the formats that suit all.
    """
    layout, built = config.layout or DEFAULT_LAYOUT, [] if config.simulate else targets
    require_shapes(
        formats,
        [(name, layer.in_features) for name, layer in layers.items()],
        set(FORMATS).intersection(*(target.accelerated(layout, config.backend) for target in built)),
        whole_groups=bool(built) and (layout == PLUGIN_LAYOUT or config.backend == "tensorrt"),
    )
    if config.transform is not None and TRANSFORMS[config.transform].rotates and not config.simulate:
        _require_blocks(config.transform, formats, layers)
    if layout == PLUGIN_LAYOUT:
        from adatsq_trt.export.plugin_operands import require_plugin_shapes

        require_plugin_shapes({name: (layer.out_features, layer.in_features) for name, layer in layers.items()})


def _require_blocks(transform: str, formats: Sequence[Format], layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a rotation of layers that no block divides.

    Raises:
        UnsupportedFormatError: names the first of them.
    """
    *_, least = rotated_blocks(formats)
    for name, layer in layers.items():
        if layer.in_features % least:
            raise UnsupportedFormatError(
                f"--transform {transform}: layer '{name}': in_features {layer.in_features} is not a multiple of "
                f"{least}, the smallest block that graphs rotate; choose a transform that does not rotate, or leave "
                "the layer out with --exclude"
            )


def choose_executor(config: BuildConfig) -> AbstractContextManager[Executor]:
    """Who computes: a Ray cluster's processors, a GPU, or this machine's processors.

    Raises:
        UserError: a device or a cluster that is not there, or one of each.
    """
    if config.ray is not None:
        address = parse_address(config.ray)
        if config.device not in (AUTO, CPU):
            raise UserError(
                f"--device {config.device}: with --ray the workers' processors compute; leave out one of them"
            )
        require_cluster(address)
        return connected(address)
    device = parse_device(config.device)
    return nullcontext(InProcess() if device.type == CPU else OnDevice(device))

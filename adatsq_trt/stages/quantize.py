"""Stage `quantize`: GPTQ with the weighted Hessians, every layer in every candidate format, once; activation scales.

With a transform, what is rounded is the transformed weight, for the transformed input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from adatsq_trt.calibration.clips import clipped_grids
from adatsq_trt.calibration.finite import require_finite_weight, require_range
from adatsq_trt.calibration.gptq import factorize, gptq_factored
from adatsq_trt.calibration.nested import NARROW, WIDE, NestedWeight, nest
from adatsq_trt.calibration.transforms.graph_form import GraphForm, rotated_blocks
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import measure_groups
from adatsq_trt.execution.device import CPU, to_device
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import PLUGIN_LAYOUT, Format, Grid
from adatsq_trt.models.format_store import (
    SCALES_NAME,
    TRANSFORMS_NAME,
    BlockFiles,
    CandidateWeights,
    load_store,
    save_weights,
    weight_owners,
    weights_name,
)
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest
from adatsq_trt.stages import calibrate, clips
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work
from adatsq_trt.transforms import IDENTITY, LayerTransform, load_transforms, save_transforms

NAME = "quantize"
NESTED = "nested.safetensors"  # planes of the layers that keep one copy for two widths


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    folder = calibrate.stage(context).folder
    files = [folder / calibrate.HESSIANS, folder / calibrate.STATISTICS]
    names: tuple[str, ...] = ("weights_sha256", "formats", "damping")
    if context.settings.transform is not None:
        names, files = (*names, "transform"), [*files, folder / calibrate.TRAJECTORY]
    inputs = context.inputs(names)
    if (form := graph_form(context)) is not None:
        inputs["rotated_blocks"] = list(form.blocks)
    if clipped_grids(context.formats):
        inputs["clips"] = context.settings.clips
    if clips.searched(context) and folder / calibrate.TRAJECTORY not in files:
        files = [*files, folder / calibrate.TRAJECTORY]
    return context.run.stage(NAME, {**inputs, "nested": True} if _nests(context) else inputs, files)


def run(context: Context) -> Stage:
    """Quantize, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    statistics = read_tensors(calibrate.stage(context).folder / calibrate.STATISTICS)
    require_range(context.formats, context.layers, statistics["largest"])
    with this.run():
        hessians = calibrate.load_hessians(context)
        transforms = _transforms(context, this)
        with context.progress("quantize", len(context.layers)) as advance:
            for block, layers in context.adapter.layers_by_block().items():
                _quantize_block(context, this, block, layers, hessians, transforms, advance)
        if _nests(context) and not this.unit(NESTED).is_file():
            write_tensors(this.unit(NESTED), _nest(context, this.folder, hessians, transforms))
        write_tensors(this.unit(SCALES_NAME), clips.activation_scales(context, this, transforms))
    return this


def work(context: Context) -> Work:
    """Count what there is to do."""
    batch, layers = context.settings.steps * context.settings.calibration_samples, len(context.layers)
    found = clips.work(context) + Work(layer=layers * (2 if _nests(context) else 1))
    if context.settings.transform is not None:
        found["call"] += batch  # groups of layers are measured
    return found


def _transforms(context: Context, this: Stage) -> dict[str, LayerTransform]:
    """The transform of every layer; none where the settings ask for none."""
    if context.settings.transform is None:
        return {}
    file = this.unit(TRANSFORMS_NAME)
    if not file.is_file():
        latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"]
        with context.on_device():
            groups = measure_groups(context.calibration, latents.to(context.device))
            made = make_transforms(context.settings.transform, groups, graph_form(context))
            save_transforms(file, to_device(made, CPU))
    return load_transforms(file)


def graph_form(context: Context) -> GraphForm | None:
    """Form of transforms in graphs; None without a transform and in simulated runs, which have the published ones."""
    if context.settings.transform is None or context.settings.simulate:
        return None
    return GraphForm(getattr(torch, context.settings.base_type), rotated_blocks(context.formats))


def _quantize_block(
    context: Context,
    this: Stage,
    block: str,
    layers: Sequence[str],
    hessians: Mapping[str, Tensor],
    transforms: Mapping[str, LayerTransform],
    advance: Callable[[], None],
) -> None:
    """A file for every weight grid; one Hessian at a time is in memory, and the block's codes."""
    owners = set(weight_owners(context.formats).values())
    files = {name: this.unit(weights_name(name, block)) for name in owners}
    missing = [fmt for fmt in context.formats if fmt.name in owners and not files[fmt.name].is_file()]
    solved: dict[str, dict[str, QuantizedWeight]] = {fmt.name: {} for fmt in missing}
    for layer, weights in zip(layers, solve_layers(context, layers, missing, hessians, transforms), strict=True):
        for fmt, weight in weights.items():
            require_finite_weight(layer, fmt, weight)
            solved[fmt.name][layer] = weight
        advance()
    for name, by_layer in solved.items():
        save_weights(files[name], by_layer)


@dataclass(frozen=True)
class Solver:
    """Formats and damping with which every layer is solved.

    Attributes:
        formats: to solve for.
        damping: of the Hessian.
    """

    formats: tuple[Format, ...]
    damping: float


@dataclass(frozen=True)
class Problem:
    """One layer.

    Attributes:
        weight: float32 [N, K].
        hessian: of its inputs, float32 [K, K]; None where no format needs it.
        transform: of weight and inputs.
    """

    weight: Tensor
    hessian: Tensor | None
    transform: LayerTransform


def solve_layers(
    context: Context,
    layers: Sequence[str],
    formats: Sequence[Format],
    hessians: Mapping[str, Tensor],
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
) -> Iterator[dict[Format, QuantizedWeight]]:
    """Some layers in some formats, layer by layer; a Hessian is read when its layer's turn comes."""
    linears = context.adapter.quantizable_layers()
    curved = any(not fmt.weight.is_float for fmt in formats)
    problems = (
        Problem(linears[n].weight.detach(), hessians[n] if curved else None, transforms.get(n, IDENTITY))
        for n in layers
    )
    common = context.executor.share(Solver(tuple(formats), context.settings.damping))
    return context.executor.map(solve_layer, common, problems)


def solve_layer(solver: Solver, problem: Problem) -> dict[Format, QuantizedWeight]:
    """One layer in some formats, which share its factorized Hessian."""
    weight = problem.transform.rounded_weight(problem.weight)
    if problem.hessian is not None:
        factored = factorize(problem.transform.input_map.second_moment(problem.hessian), solver.damping)
    solved: dict[Grid, QuantizedWeight] = {}  # formats may differ in activations only
    for fmt in solver.formats:
        if fmt.weight not in solved:
            plain = fmt.weight.is_float
            solved[fmt.weight] = quantize_nearest(weight, fmt) if plain else gptq_factored(weight, factored, fmt)
    return {fmt: solved[fmt.weight] for fmt in solver.formats}


def solve(
    context: Context,
    fmt: Format,
    hessians: Mapping[str, Tensor],
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
) -> dict[str, QuantizedWeight]:
    """One format of every layer."""
    solved = solve_layers(context, context.layers, [fmt], hessians, transforms)
    return {layer: weights[fmt] for layer, weights in zip(context.layers, solved, strict=True)}


def _nests(context: Context) -> bool:
    """Whether layers may be stored in two planes: where both widths are candidates and a backend reads planes."""
    grids = {fmt.weight for fmt in context.formats}
    return context.settings.layout == PLUGIN_LAYOUT and {NARROW.weight, WIDE.weight} <= grids


def _with_grid(context: Context, grid: Grid) -> list[str]:
    """Names of the candidates that have a weight grid; weights are stored under the first one's."""
    return [fmt.name for fmt in context.formats if fmt.weight == grid]


def _nest(
    context: Context, folder: Path, hessians: Mapping[str, Tensor], transforms: Mapping[str, LayerTransform]
) -> dict[str, Tensor]:
    """Planes of the layers that lose little when they are nested: "<module path>.<attribute of NestedWeight>"."""
    names = [_with_grid(context, fmt.weight)[0] for fmt in (NARROW, WIDE)]
    narrow, wide = (BlockFiles(folder / name, context.layers) for name in names)
    linears, tensors = context.adapter.quantizable_layers(), dict[str, Tensor]()
    problems = (
        (Problem(linear.weight.detach(), hessians[n], transforms.get(n, IDENTITY)), narrow[n], wide[n])
        for n, linear in linears.items()
    )
    with context.progress("quantize: nested layers", len(linears)) as advance:
        solved = context.executor.map(_nest_layer, context.executor.share(context.settings.damping), problems)
        for layer, planes in zip(linears, solved, strict=True):
            if planes is not None:
                tensors |= {f"{layer}.{field.name}": getattr(planes, field.name) for field in fields(planes)}
            advance()
    return tensors or {"none": torch.zeros(0)}  # safetensors needs a tensor


def _nest_layer(damping: float, given: tuple[Problem, QuantizedWeight, QuantizedWeight]) -> NestedWeight | None:
    problem, narrow, wide = given
    assert problem.hessian is not None, "planes are solved under the Hessian"
    weight = problem.transform.rounded_weight(problem.weight)
    return nest(weight, problem.transform.input_map.second_moment(problem.hessian), narrow, wide, damping)


def load_layer_transforms(context: Context) -> dict[str, LayerTransform]:
    """Module path → transform; empty where the settings ask for none."""
    return {} if context.settings.transform is None else load_transforms(stage(context).folder / TRANSFORMS_NAME)


def load(context: Context) -> CandidateWeights:
    """Load the stage's weights where the model is; nested layers have their planes in every format that reads them."""
    store, device = _load(context), context.adapter.device
    return store if device.type == CPU else to_device(store, device)


def _load(context: Context) -> CandidateWeights:
    folder = stage(context).folder
    store = load_store(folder, context.settings.formats, context.layers)
    if not _nests(context):
        return store
    tensors, weights = read_tensors(folder / NESTED), {name: dict(own) for name, own in store.weights.items()}
    for layer in context.layers:
        if f"{layer}.high" in tensors:
            planes = NestedWeight(**{field.name: tensors[f"{layer}.{field.name}"] for field in fields(NestedWeight)})
            for fmt, plane in ((NARROW, planes.narrow), (WIDE, planes.wide)):
                for name in _with_grid(context, fmt.weight):
                    weights[name][layer] = plane
    return CandidateWeights(weights, store.scales, store.transforms)

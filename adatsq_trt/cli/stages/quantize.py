"""Stage `quantize`: GPTQ with the weighted Hessians, every layer in every candidate format, once.

With a transform, what is rounded is the transformed weight, for the transformed input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.nested import NARROW, WIDE, NestedWeight, nest
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import largest_inputs, measure_groups
from adatsq_trt.cli.progress import progress
from adatsq_trt.cli.stages import calibrate
from adatsq_trt.cli.stages.context import Context
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import PLUGIN_LAYOUT, Format, Grid
from adatsq_trt.models.format_store import (
    SCALES_NAME,
    TRANSFORMS_NAME,
    FormatStore,
    load_store,
    load_weights,
    save_weights,
    weights_name,
)
from adatsq_trt.models.transforms import IDENTITY, LayerTransform, load_transforms, save_transforms
from adatsq_trt.quantize import QuantizedWeight, static_activation_scale
from adatsq_trt.run import Stage

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
    return context.run.stage(NAME, {**inputs, "nested": True} if _nests(context) else inputs, files)


def run(context: Context) -> Stage:
    """Quantize, unless that is done."""
    calibrate.run(context)
    this = stage(context)
    if this.done:
        return this
    with this.run():
        hessians = read_tensors(calibrate.stage(context).folder / calibrate.HESSIANS)
        transforms = _transforms(context, this)
        solved: dict[Grid, dict[str, QuantizedWeight]] = {}  # formats may differ in activations only
        with progress("quantize", len(context.formats)) as advance:
            for fmt in context.formats:
                file = this.unit(weights_name(fmt.name))
                if not file.is_file():
                    if fmt.weight not in solved:
                        solved[fmt.weight] = solve(context, fmt, hessians, transforms)
                    save_weights(file, solved[fmt.weight])
                advance()
        if _nests(context) and not this.unit(NESTED).is_file():
            write_tensors(this.unit(NESTED), _nest(context, this.folder, hessians))
        write_tensors(this.unit(SCALES_NAME), activation_scales(context, transforms))
    return this


def _transforms(context: Context, this: Stage) -> dict[str, LayerTransform]:
    """The transform of every layer; none where the settings ask for none."""
    if context.settings.transform is None:
        return {}
    file = this.unit(TRANSFORMS_NAME)
    if not file.is_file():
        latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"]
        groups = measure_groups(context.calibration, latents)
        save_transforms(file, make_transforms(context.settings.transform, groups))
    return load_transforms(file)


def solve(
    context: Context,
    fmt: Format,
    hessians: Mapping[str, Tensor],
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
) -> dict[str, QuantizedWeight]:
    """One format of every layer."""
    layers = context.adapter.quantizable_layers()
    problems = (
        (linear.weight.detach(), hessians[name], transforms.get(name, IDENTITY)) for name, linear in layers.items()
    )
    common = context.workers.share((fmt, context.settings.damping))
    return dict(zip(layers, context.workers.map(_solve_layer, common, problems), strict=True))


def _solve_layer(common: tuple[Format, float], problem: tuple[Tensor, Tensor, LayerTransform]) -> QuantizedWeight:
    (fmt, damping), (weight, hessian, transform) = common, problem
    moment = transform.input_map.second_moment(hessian)
    return gptq(transform.rounded_weight(weight), moment, fmt, damping=damping)


def _nests(context: Context) -> bool:
    """Whether layers may be stored in two planes: where both widths are candidates and a backend reads planes."""
    return context.settings.layout == PLUGIN_LAYOUT and {NARROW.name, WIDE.name} <= set(context.settings.formats)


def _nest(context: Context, folder: Path, hessians: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Planes of the layers that lose little when they are nested: "<module path>.<attribute of NestedWeight>"."""
    narrow, wide = (load_weights(folder / weights_name(fmt.name), context.layers) for fmt in (NARROW, WIDE))
    linears, tensors = context.adapter.quantizable_layers(), dict[str, Tensor]()
    problems = ((linear.weight.detach(), hessians[n], narrow[n], wide[n]) for n, linear in linears.items())
    with progress("quantize: nested layers", len(linears)) as advance:
        solved = context.workers.map(_nest_layer, context.workers.share(context.settings.damping), problems)
        for layer, planes in zip(linears, solved, strict=True):
            if planes is not None:
                tensors |= {f"{layer}.{field.name}": getattr(planes, field.name) for field in fields(planes)}
            advance()
    return tensors or {"none": torch.zeros(0)}  # safetensors needs a tensor


def _nest_layer(
    damping: float, problem: tuple[Tensor, Tensor, QuantizedWeight, QuantizedWeight]
) -> NestedWeight | None:
    return nest(*problem, damping)


def activation_scales(
    context: Context, transforms: Mapping[str, LayerTransform] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Static scales of the formats that have them: float32 [steps, layers]."""
    folder = calibrate.stage(context).folder
    if transforms and any(fmt.static_activation for fmt in context.formats):
        latents = read_tensors(folder / calibrate.TRAJECTORY)["latents"]
        largest = largest_inputs(context.calibration, latents, transforms)
    else:
        largest = read_tensors(folder / calibrate.STATISTICS)["largest"]
    scales = {f.name: static_activation_scale(largest, f.activation) for f in context.formats if f.static_activation}
    return scales or {"none": largest.new_zeros(0)}  # safetensors needs a tensor


def load_layer_transforms(context: Context) -> dict[str, LayerTransform]:
    """Module path → transform; empty where the settings ask for none."""
    return {} if context.settings.transform is None else load_transforms(stage(context).folder / TRANSFORMS_NAME)


def load(context: Context) -> FormatStore:
    """What the stage wrote; nested layers have their planes in every format that reads them."""
    folder = stage(context).folder
    store = load_store(folder, context.settings.formats, context.layers)
    if not _nests(context):
        return store
    tensors, weights = read_tensors(folder / NESTED), {name: dict(own) for name, own in store.weights.items()}
    for layer in context.layers:
        if f"{layer}.high" in tensors:
            planes = NestedWeight(**{field.name: tensors[f"{layer}.{field.name}"] for field in fields(NestedWeight)})
            weights[WIDE.name][layer] = planes.wide
            for fmt in context.formats:
                if fmt.weight == NARROW.weight:
                    weights[fmt.name][layer] = planes.narrow
    return FormatStore(weights, store.scales, store.transforms)

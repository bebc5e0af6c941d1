"""Scales of the activations at every step and layer: static scales, and the ratios that clip.

A part of stage `quantize`; a search for ratios is one more backward sweep, kept on disk step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.calibration.clips import PROJECTIONS, ClipSearch, best_ratios, clip_errors, clipped_grids, scale_with
from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.transforms.statistics import largest_inputs, sharing_layers
from adatsq_trt.calibration.units import Measured, backward_sweep
from adatsq_trt.execution.device import CPU, to_device
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import Grid
from adatsq_trt.models.capture import captured
from adatsq_trt.solver import State
from adatsq_trt.stages import calibrate
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work
from adatsq_trt.transforms import LayerTransform


def searched(context: Context) -> bool:
    """Whether ratios are searched: where they are asked for and a format takes one."""
    return context.settings.clips == "searched" and bool(clipped_grids(context.formats))


def work(context: Context) -> Work:
    """Count what there is to do."""
    batch, found = context.settings.steps * context.settings.calibration_samples, Work()
    if context.settings.transform is not None and any(fmt.scaled_activation for fmt in context.formats):
        found["call"] += batch  # largest inputs are measured again
    if searched(context):
        found["clips"] += batch
        found["call"] += len(_steps_of_experts(context))
    return found


def activation_scales(context: Context, this: Stage, transforms: Mapping[str, LayerTransform]) -> dict[str, Tensor]:
    """Format name → float32 [steps, layers], for the formats that have such a number.

    Args:
        context: a run that was calibrated.
        this: stage `quantize`, under way.
        transforms: of its layers.
    """
    formats = [fmt for fmt in context.formats if fmt.scaled_activation]
    if not formats:
        return {"none": torch.zeros(0)}  # safetensors needs a tensor
    largest = _largest(context, transforms)
    ratios = _ratios(context, this, transforms, largest) if searched(context) else {}
    return {f.name: scale_with(ratios.get(f.activation, 1.0), largest, f.activation) for f in formats}


def _largest(context: Context, transforms: Mapping[str, LayerTransform]) -> Tensor:
    """Largest magnitude of every layer's transformed input, float32 [steps, layers]."""
    folder = calibrate.stage(context).folder
    if not transforms:
        return read_tensors(folder / calibrate.STATISTICS)["largest"]
    latents = read_tensors(folder / calibrate.TRAJECTORY)["latents"]
    with context.on_device():
        there = to_device(transforms, context.device)
        return largest_inputs(context.calibration, latents.to(context.device), there).to(CPU)


def _ratios(
    context: Context, this: Stage, transforms: Mapping[str, LayerTransform], largest: Tensor
) -> dict[Grid, Tensor]:
    """The ratio of every grid that is clipped, float32 [steps, layers]."""
    grids, steps = clipped_grids(context.formats), context.settings.steps
    files = [this.unit(f"clips/step_{t:03d}.safetensors") for t in range(steps)]
    with context.progress("quantize: clips", steps) as advance, context.on_device():
        for _ in range(sum(file.is_file() for file in files)):
            advance()
        latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"]
        there, device = to_device(transforms, context.device), context.device
        for step, errors, adjoint in _sweep(context, files, latents, ClipSearch(grids, largest.to(device), there)):
            write_tensors(files[step], {"errors": errors, **adjoint.named("adjoint")})
            advance()
        groups = _sharing(context, latents)
    errors = torch.stack([read_tensors(file)["errors"] for file in files])
    return dict(zip(grids, best_ratios(errors, groups), strict=True))


def _sweep(
    context: Context, files: list[Path], latents: Tensor, search: ClipSearch
) -> Iterator[tuple[int, Tensor, State[Tensor]]]:
    """Step, errors [layers, grids, ratios] and adjoint of the steps that are not on disk, from the last one back."""
    missing = [t for t, file in enumerate(files) if not file.is_file()]
    if not missing:
        return
    last, samples = max(missing), context.calibration
    start = projections(len(samples.seeds), context.adapter.latent_shape, PROJECTIONS, context.settings.seed)
    adjoint = State(start) if last == len(files) - 1 else State.from_named(read_tensors(files[last + 1]), "adjoint")
    common = context.executor.share(Measured(samples, search, context.by_block(PROJECTIONS)))
    for swept in backward_sweep(context.executor, common, clip_errors, latents, adjoint, last):
        yield swept.step, torch.stack(swept.measured).sum(dim=0), swept.adjoint


@torch.no_grad()
def _sharing(context: Context, latents: Tensor) -> list[list[int]]:
    """Indices of the layers that are given the same tensor."""
    sample = context.calibration.part(slice(0, 1))
    place, groups = {layer: index for index, layer in enumerate(context.layers)}, list[list[int]]()
    for step in _steps_of_experts(context):
        with captured(context.adapter.quantizable_layers()) as capture:
            sample.velocity(latents[step, :1].to(context.device), step)
        groups += [[place[name] for name in names] for names in sharing_layers(capture.inputs, capture.inputs)]
    return groups


def _steps_of_experts(context: Context) -> list[int]:
    """The first step of each part of the model."""
    experts = context.schedule.experts
    return [experts.index(expert) for expert in dict.fromkeys(experts)] or [0]

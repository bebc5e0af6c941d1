"""Stage `calibrate`: trajectories, activation statistics, Fisher information, temporal weights, Hessians."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adatsq_trt.calibration.finite import require_finite_trajectory
from adatsq_trt.calibration.fisher import projections, temporal_weights
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import (
    Measured,
    backward_sweep,
    measured_trajectory,
    squared_gradients,
    step_statistics,
)
from adatsq_trt.cli.progress import progress
from adatsq_trt.cli.stages import embed
from adatsq_trt.cli.stages.context import Context
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.run import Stage
from adatsq_trt.workers import Shared

NAME = "calibrate"
TRAJECTORY, STATISTICS = "trajectory.safetensors", "statistics.safetensors"
HESSIANS, PLAIN_HESSIANS = "hessians.safetensors", "unweighted_hessians.safetensors"
_SETTINGS = ("weights_sha256", "model_sha256", "steps", "guidance", "seed", "calibration_samples", "temperature")

Advance = Callable[[], None]


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    encodings = [] if context.settings.pipeline is None else [embed.encodings_file(context.run)]
    return context.run.stage(NAME, context.inputs(_SETTINGS), encodings)


def run(context: Context) -> Stage:
    """Calibrate, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    steps = context.settings.steps
    with this.run():
        batch = context.workers.share(context.calibration)
        with progress("calibrate: trajectory", steps) as advance:
            latents = _trajectory(context, this, batch, advance)
        with progress("calibrate: Fisher information", steps) as advance:
            information = _fisher(context, this, latents, advance)
        with progress("calibrate: Hessians", steps) as advance:
            _hessians(context, this, batch, latents, information, advance)
    return this


def _trajectory(context: Context, this: Stage, batch: Shared[Samples], advance: Advance) -> Tensor:
    file = this.unit(TRAJECTORY)
    if not file.is_file():
        latents = [context.calibration.noise()]
        for latent in measured_trajectory(context.workers, batch, latents[0], context.settings.steps):
            latents.append(latent)
            advance()
        whole = torch.stack(latents)
        require_finite_trajectory(context.calibration, whole)
        write_tensors(file, {"latents": whole})
    return read_tensors(file)["latents"]


def _fisher(context: Context, this: Stage, latents: Tensor, advance: Advance) -> Tensor:
    """I[t,l], float32 [steps, layers]; one projection per sample, a file per step."""
    samples, steps = context.calibration, context.settings.steps
    files = [this.unit(f"fisher/step_{t:03d}.safetensors") for t in range(steps)]
    missing = [t for t in range(steps) if not files[t].is_file()]
    if missing:
        last = max(missing)
        start = projections(len(samples.seeds), context.adapter.latent_shape, 1, context.settings.seed)
        adjoint = start if last == steps - 1 else read_tensors(files[last + 1])["adjoint"]
        common = context.workers.share(Measured(samples, None))
        for step in backward_sweep(context.workers, common, squared_gradients, latents, adjoint, last):
            information = torch.cat(step.measured, dim=2).mean(dim=(1, 2))
            write_tensors(files[step.step], {"information": information, "adjoint": step.adjoint})
            advance()
    return torch.stack([read_tensors(file)["information"] for file in files])


def _hessians(
    context: Context, this: Stage, batch: Shared[Samples], latents: Tensor, information: Tensor, advance: Advance
) -> None:
    """H' with temporal weights, the same without, and the largest activation of every (step, layer)."""
    alpha = temporal_weights(information, context.settings.temperature)
    flat = torch.full_like(alpha, 1 / len(alpha))
    weighted: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    largest, rows = [], dict[str, int]()
    # Results come in the order of the steps, so sums are taken in that order wherever they were computed.
    for step, found in enumerate(step_statistics(context.workers, batch, latents)):
        for index, (name, moment) in enumerate(found.moments.items()):
            weighted[name] = weighted.get(name, 0) + alpha[step, index] * moment
            plain[name] = plain.get(name, 0) + flat[step, index] * moment
        largest.append(found.largest)
        rows = found.rows
        advance()
    write_tensors(this.unit(HESSIANS), weighted)
    write_tensors(this.unit(PLAIN_HESSIANS), plain)
    counts = torch.tensor([rows[name] for name in context.layers])
    statistics = {"information": information, "alpha": alpha, "largest": torch.stack(largest), "tokens": counts}
    write_tensors(this.unit(STATISTICS), statistics)

"""Stage `calibrate`: trajectories, activation statistics, Fisher information, temporal weights, Hessians."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from adatsq_trt.calibration.finite import require_finite_trajectory
from adatsq_trt.calibration.fisher import backward_sweep, projections, squared_weight_gradient, temporal_weights
from adatsq_trt.calibration.hessian import second_moment
from adatsq_trt.calibration.trajectory import trajectory
from adatsq_trt.cli.progress import progress
from adatsq_trt.cli.stages import embed
from adatsq_trt.cli.stages.context import Context
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.models.capture import captured
from adatsq_trt.run import Stage

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
        with progress("calibrate: trajectory", steps) as advance:
            latents = _trajectory(context, this, advance)
        with progress("calibrate: Fisher information", steps) as advance:
            information = _fisher(context, this, latents, advance)
        with progress("calibrate: Hessians", steps) as advance:
            _hessians(context, this, latents, information, advance)
    return this


def _trajectory(context: Context, this: Stage, advance: Advance) -> Tensor:
    file = this.unit(TRAJECTORY)
    if not file.is_file():
        latents = trajectory(context.calibration, on_step=advance)
        require_finite_trajectory(context.calibration, latents)
        write_tensors(file, {"latents": latents})
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
        for step in backward_sweep(samples, latents, adjoint, last):
            rows = [squared_weight_gradient(step.inputs[n], step.gradients[n]).mean() for n in context.layers]
            write_tensors(files[step.step], {"information": torch.stack(rows), "adjoint": step.adjoint})
            advance()
    return torch.stack([read_tensors(file)["information"] for file in files])


def _hessians(context: Context, this: Stage, latents: Tensor, information: Tensor, advance: Advance) -> None:
    """H' with temporal weights, the same without, and the largest activation of every (step, layer)."""
    alpha = temporal_weights(information, context.settings.temperature)
    flat = torch.full_like(alpha, 1 / len(alpha))
    weighted: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    largest = torch.zeros_like(alpha)
    rows: dict[str, int] = {}
    for step, inputs in _layer_inputs(context, latents):
        for index, (name, value) in enumerate(inputs.items()):
            moment = second_moment(value)
            weighted[name] = weighted.get(name, 0) + alpha[step, index] * moment
            plain[name] = plain.get(name, 0) + flat[step, index] * moment
            largest[step, index] = value.abs().max()
            rows[name] = value.shape[:-1].numel() // len(context.calibration.seeds)
        advance()
    write_tensors(this.unit(HESSIANS), weighted)
    write_tensors(this.unit(PLAIN_HESSIANS), plain)
    counts = torch.tensor([rows[name] for name in context.layers])
    statistics = {"information": information, "alpha": alpha, "largest": largest, "tokens": counts}
    write_tensors(this.unit(STATISTICS), statistics)


@torch.no_grad()
def _layer_inputs(context: Context, latents: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What every layer is given at every step of the full-precision trajectory."""
    linears = context.adapter.quantizable_layers()
    for step in range(context.settings.steps):
        with captured(linears) as capture:
            context.calibration.step(latents[step], step)
        yield step, {name: capture.inputs[name] for name in linears}

"""Stage `calibrate`: trajectories, activation statistics, Fisher information, temporal weights, Hessians.

And what rounding the weights to the declared type costs, since nothing later sees the checkpoint's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.calibration.finite import require_finite_trajectory
from adatsq_trt.calibration.fisher import projections, proportional_weights, temporal_weights
from adatsq_trt.calibration.hessian import LayerMoments, hessian_bytes, layer_moments
from adatsq_trt.calibration.trajectory import Samples, latent_mse, state_tensors, trajectory
from adatsq_trt.calibration.units import Measured, backward_sweep, measured_trajectory, squared_gradients
from adatsq_trt.execution import Shared
from adatsq_trt.execution.device import CPU
from adatsq_trt.files import MappedTensors, read_tensors, write_tensors
from adatsq_trt.solver import State
from adatsq_trt.stages import embed, gradients
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work

NAME = "calibrate"
TRAJECTORY, STATISTICS, ROUNDING = "trajectory.safetensors", "statistics.safetensors", "rounding.safetensors"
HESSIANS, PLAIN_HESSIANS, RANGES = "hessians", "unweighted_hessians", "ranges"  # folders with a file for each block
_ROUNDING_SAMPLES = 8  # of the batch, run once more with the checkpoint's own numbers
_SETTINGS = ("weights_sha256", "model_sha256", "steps", "guidance", "seed", "calibration_samples", "temperature")

Advance = Callable[[], None]


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    encodings = [] if context.settings.pipeline is None else [embed.encodings_file(context.run)]
    # Newer settings count where they are not the default, so that earlier runs go on.
    newer = ("excluded",) if context.settings.excluded else ()
    if context.settings.hessian != "paper":
        newer = (*newer, "hessian")
    inputs = {**context.inputs((*_SETTINGS, *newer)), "hessians": "by block"}
    if not context.schedule.is_euler:
        inputs["steps of"] = context.schedule.scheduler_config["_class_name"]
    return context.run.stage(NAME, inputs, encodings)


def run(context: Context) -> Stage:
    """Calibrate, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    steps = context.settings.steps
    with this.run():
        with context.on_device():
            batch = context.executor.share(context.calibration)
            with context.progress("calibrate: trajectory", steps) as advance:
                latents = _trajectory(context, this, batch, advance)
            with context.progress("calibrate: Fisher information", steps) as advance:
                information = _fisher(context, this, latents, advance)
            _hessians(context, this, batch, latents, information)
        _rounding(context, this, latents[-1])
    return this


def work(context: Context) -> Work:
    """Count what there is to do; the rounding of the weights is measured where they may be rounded."""
    settings, blocks = context.settings, tuple(context.adapter.layers_by_block())
    batch = settings.steps * settings.calibration_samples
    found = Work(call=batch, fisher=batch, moments=len(hessian_passes(context, blocks)) * batch)
    if settings.hessian in gradients.FORMS:
        passes = gradients.gradient_passes(context, blocks)
        found["gradients"] = settings.steps * sum(one.swept(settings.calibration_samples) for one in passes)
    if settings.base_type != "float32":
        found["call"] += settings.steps * min(_ROUNDING_SAMPLES, settings.calibration_samples)
    return found


def _trajectory(context: Context, this: Stage, batch: Shared[Samples], advance: Advance) -> Tensor:
    file = this.unit(TRAJECTORY)
    if not file.is_file():
        noise = context.calibration.noise()
        states = [State(noise)]
        for state in measured_trajectory(context.executor, batch, noise, context.settings.steps):
            states.append(state)
            advance()
        whole = state_tensors(states)
        require_finite_trajectory(context.calibration, whole["latents"])
        write_tensors(file, whole)
    return read_tensors(file)["latents"]


def _fisher(context: Context, this: Stage, latents: Tensor, advance: Advance) -> Tensor:
    """I[t,l], float32 [steps, layers]; one projection per sample, a file per step."""
    samples, steps = context.calibration, context.settings.steps
    files = [this.unit(f"fisher/step_{t:03d}.safetensors") for t in range(steps)]
    missing = [t for t in range(steps) if not files[t].is_file()]
    if missing:
        last = max(missing)
        start = projections(len(samples.seeds), context.adapter.latent_shape, 1, context.settings.seed)
        adjoint = State(start) if last == steps - 1 else State.from_named(read_tensors(files[last + 1]), "adjoint")
        common = context.executor.share(Measured(samples, None, context.by_block(projections=1)))
        for step in backward_sweep(context.executor, common, squared_gradients, latents, adjoint, last):
            information = torch.cat(step.measured, dim=2).mean(dim=(1, 2))
            write_tensors(files[step.step], {"information": information, **step.adjoint.named("adjoint")})
            advance()
    return torch.stack([read_tensors(file)["information"] for file in files])


def _hessians(context: Context, this: Stage, batch: Shared[Samples], latents: Tensor, information: Tensor) -> None:
    """Write the Hessians for GPTQ, the same without step weights, and the largest input of every (step, layer)."""
    _moments(context, this, batch, latents, information)
    blocks = context.adapter.layers_by_block()
    if context.settings.hessian in gradients.FORMS:
        files = {block: this.unit(f"{HESSIANS}/{block}.safetensors") for block in blocks}
        gradients.write_hessians(context, this, latents, files)
    ranges = MappedTensors(this.unit(f"{RANGES}/{block}.safetensors") for block in blocks)
    alpha = _step_weights(context, information)
    statistics = {
        "information": information,
        "alpha": torch.full_like(information, 1 / len(information)) if alpha is None else alpha,
        "largest": torch.stack([ranges[f"{layer}.largest"] for layer in context.layers], dim=1),
        "tokens": torch.stack([ranges[f"{layer}.tokens"] for layer in context.layers]),
    }
    write_tensors(this.unit(STATISTICS), statistics)


def _step_weights(context: Context, information: Tensor) -> Tensor | None:
    """alpha, float32 [steps, layers]; None where Hessians have no weights by steps."""
    if context.settings.hessian == "paper":
        return temporal_weights(information, context.settings.temperature)
    return proportional_weights(information) if context.settings.hessian == "linear" else None


def _moments(context: Context, this: Stage, batch: Shared[Samples], latents: Tensor, information: Tensor) -> None:
    """H' with weights by steps, the same without, and ranges.

    Memory holds the Hessians of some blocks at a time; each such group takes a pass over the trajectory.
    """
    alpha, blocks = _step_weights(context, information), context.adapter.layers_by_block()
    columns = dict(zip(context.layers, [None] * len(context.layers) if alpha is None else alpha.mT, strict=True))
    missing = [block for block in blocks if not all(file.is_file() for file in _files_of(context, this, block))]
    passes = hessian_passes(context, missing)
    with context.progress("calibrate: Hessians", len(passes) * context.settings.steps) as advance:
        for group in passes:
            weights = {layer: columns[layer] for block in group for layer in blocks[block]}
            moments = layer_moments(context.executor, batch, latents, weights, advance)
            for block in group:
                _write_block(context, this, block, {layer: moments.pop(layer) for layer in blocks[block]})


def _rounding(context: Context, this: Stage, last: Tensor) -> None:
    """Latent MSE of the model as rounded against the checkpoint's own numbers, both in full precision: float32 [].

    Args:
        context: of the run.
        this: the stage.
        last: final latents of the rounded model, float32 [samples, *latent_shape].
    """
    file, rounding, error = this.unit(ROUNDING), context.model.rounding, 0.0
    if file.is_file():
        return
    if not rounding.changes_nothing:
        samples = context.calibration.part(slice(0, _ROUNDING_SAMPLES))
        with (
            context.progress("calibrate: rounding of the weights", context.settings.steps) as advance,
            rounding.undone(),
            context.on_device(),
        ):
            own = trajectory(samples, on_step=advance)[-1].to(CPU)
        error = latent_mse(last[: len(own)], own)
    write_tensors(file, {"error": torch.tensor(error)})


def hessian_passes(context: Context, blocks: Sequence[str]) -> list[list[str]]:
    """Group consecutive blocks, so that the Hessians of a group fit in memory; a group has at least one block."""
    linears, layers = context.adapter.quantizable_layers(), context.adapter.layers_by_block()
    room, groups, free = context.room_bytes, list[list[str]](), 0
    for block in blocks:
        held, passing = hessian_bytes(linears[layer].in_features for layer in layers[block])
        if not groups or held + passing > free:
            groups.append([])
            free = room
        groups[-1].append(block)
        free -= held
    return groups


def _files_of(context: Context, this: Stage, block: str) -> list[Path]:
    """Unweighted Hessians, ranges, and Hessians where these are moments of the inputs too."""
    folders = [PLAIN_HESSIANS, RANGES, *([] if context.settings.hessian in gradients.FORMS else [HESSIANS])]
    return [this.unit(f"{folder}/{block}.safetensors") for folder in folders]


def _write_block(context: Context, this: Stage, block: str, moments: dict[str, LayerMoments]) -> None:
    """The files of a block."""
    plain, ranges, *hessians = _files_of(context, this, block)
    for file in hessians:
        write_tensors(file, {n: own.plain if own.weighted is None else own.weighted for n, own in moments.items()})
    write_tensors(plain, {layer: moment.plain for layer, moment in moments.items()})
    largest = {f"{layer}.largest": moment.largest for layer, moment in moments.items()}
    tokens = {f"{layer}.tokens": torch.tensor(moment.tokens) for layer, moment in moments.items()}
    write_tensors(ranges, largest | tokens)


def load_hessians(context: Context, folder: str = HESSIANS) -> MappedTensors:
    """Module path → float32 [K, K], read when it is asked for.

    Args:
        context: a run that was calibrated.
        folder: `HESSIANS` or `PLAIN_HESSIANS`.
    """
    where = stage(context).folder / folder
    return MappedTensors(where / f"{block}.safetensors" for block in context.adapter.layers_by_block())

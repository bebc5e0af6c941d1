"""Estimates of what every stage keeps resident, made before anything runs; a limit that cannot work is refused.

The estimates are upper bounds with the factors below, which `benchmarks/size` checks against measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from adatsq_trt.calibration.clips import PROJECTIONS, clipped_grids
from adatsq_trt.calibration.fisher import MOST_ROW_PRODUCTS
from adatsq_trt.calibration.hessian import hessian_bytes
from adatsq_trt.calibration.shared_gradients import sample_bytes, sums_bytes
from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL
from adatsq_trt.calibration.units import SAMPLES_PER_BACKWARD
from adatsq_trt.checkpoints.loading import OpenedPipeline
from adatsq_trt.errors import UserError
from adatsq_trt.formats import PLUGIN_LAYOUT, format_named, target_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.flow import Flow, measure_flow
from adatsq_trt.models.stored import count_weights
from adatsq_trt.settings import Settings
from adatsq_trt.stages import gradients
from adatsq_trt.stages.context import Memory
from adatsq_trt.stages.meter import machine_bytes, resident_bytes
from adatsq_trt.zoo.loading import LoadedModel

# Outputs as large as the largest that are alive at once in a call.
_ALIVE = 4
# GPTQ works on three float64 copies of a Hessian, and a float32 one.
_SOLVER = 3 * 8 + 4
# Copies of a weight in float32 while it is rounded.
_ROUNDED = 6
# What the export needs where it copies the weights in 16 bits, as a multiple of these; what the compiler needs,
# likewise, for a graph with its weights and for one whose weights are inputs.
_EXPORT, _COMPILER, _WEIGHTLESS = 3, 4, 0.25
BUNDLE = "bundle"  # the last stage
_LESS_PLAN = "--layout shared, whose plans hold no weights"
_LIBRARIES = 400_000_000  # that are imported on the way
_STEP = 100_000_000  # limits are named in such steps


@dataclass(frozen=True)
class Model:
    """Sizes of a model that the estimates depend on.

    Attributes:
        weights: parameters of the transformer.
        shapes: (K, N) of the quantizable layers, by block.
        flow: of one sample.
        encodings: numbers in the encodings of all prompts.
        encoder_bytes: while text encoders are loaded.
        resident_bytes: of the transformer, with what a call makes of a stored weight.
        file_bytes: of the largest weight file, where it is mapped as a whole while it is read.
        copied: whether the export makes a copy of the weights.
        latent_bytes: of one sample in float32.
        carried: clean latents of earlier steps that a state of the loop has beside its latent; none by Euler's method.
    """

    weights: int
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    flow: Flow
    encodings: int
    encoder_bytes: int
    resident_bytes: int
    file_bytes: int
    copied: bool
    latent_bytes: int
    carried: int


def plan_memory(
    limit: int | None,
    settings: Settings,
    outline: LoadedModel,
    pipeline: OpenedPipeline | None = None,
    until: str = BUNDLE,
) -> Memory:
    """Plan the resident memory of a run.

    Args:
        limit: in bytes; None for all that the machine has.
        settings: of the run.
        outline: the model, whose weights need not be in memory.
        pipeline: the checkpoint that it comes from.
        until: the last stage that is to run.

    Raises:
        UserError: the limit is too small; names the smallest that would do.
    """
    model = _model(settings, outline, pipeline)
    least = needed_bytes(settings, model, resident_bytes())
    names = list(least)
    needs = {name: least[name] for name in names[: names.index(until) + 1]}
    stage = max(needs, key=lambda name: needs[name])
    if limit is not None and limit < least[stage]:
        smallest = -(-least[stage] // _STEP) * _STEP / 1e9
        raise UserError(
            f"--memory-limit {limit / 1e9:g} GB: stage '{stage}' needs {least[stage] / 1e9:.1f} GB for "
            f"{model.weights / 1e9:.2f} billion weights; pass at least --memory-limit {smallest:.1f}GB, or "
            f"{_LESS_PLAN if stage == BUNDLE else 'fewer samples or a smaller size'}"
        )
    flow, samples = model.flow, min(SAMPLES_PER_BACKWARD, settings.calibration_samples)
    return Memory(
        machine_bytes() if limit is None else limit,
        _call_bytes(settings, flow),
        samples * flow.backward_bytes(0),
        samples * flow.layers_bytes,
        samples * flow.block_backward_bytes(1),
        needs,
    )


def needed_bytes(settings: Settings, model: Model, before: int) -> dict[str, int]:
    """Stage → the least that it can have resident, in the order of the stages.

    Args:
        settings: of the run.
        model: its model.
        before: resident without a model.
    """
    flow, pairs, before = model.flow, [pair for block in model.shapes for pair in block], before + _LIBRARIES
    held = before + model.resident_bytes + 2 * model.encodings
    fisher, sensitivity = sweep_bytes(settings, flow, pairs)
    # Hessians of a block, and one of its two files as it is being written.
    sums = max(sum(hessian_bytes(width for width, _ in block)) for block in model.shapes)
    sums += max(sum(4 * width**2 for width, _ in block) for block in model.shapes)
    shared = gradient_bytes(settings, flow, model.shapes)
    call, (loop, adjoints, paths) = _call_bytes(settings, flow), state_bytes(settings, model)
    rounded = max(_ROUNDED * 4 * width * rows for width, rows in pairs)
    solver = max(_SOLVER * width**2 for width, _ in pairs)
    block_codes = max(sum(4 * width * rows for width, rows in block) for block in model.shapes)
    search = loop + call + rounded
    if settings.policy is None:
        search = loop + adjoints + max(sensitivity, paths + call + rounded)
    copy = _EXPORT if model.copied else 0
    return {
        "embed": before + model.encoder_bytes,
        "loading": held + model.file_bytes,
        "calibrate": held + loop + max(fisher, call + sums, shared),
        "quantize": held + max(solver + rounded + block_codes, loop + _clip_bytes(settings, flow, pairs)),
        "search": held + search,
        # Of a block the sums of two second moments in each format, and those of one part of the batch.
        "refine": held + loop + max(call + rounded + 2 * sums, solver + rounded) if settings.refine else 0,
        "export": held + max(copy * 2 * model.weights, call + rounded, 8 * model.encodings),
        BUNDLE: before + int(_compiled(settings) * 2 * model.weights),
    }


def _compiled(settings: Settings) -> float:
    """Estimate the compiler's memory, as a multiple of the weights in 16 bits."""
    if settings.simulate or settings.layout == PLUGIN_LAYOUT:
        return 0
    if all(target_named(name).compute_capability is None for name in settings.targets):
        return 0
    return _WEIGHTLESS if settings.layout == "shared" else _COMPILER


def sweep_bytes(settings: Settings, flow: Flow, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Estimate the least bytes of the backward sweeps for Fisher information and for sensitivities.

    Args:
        settings: of the run.
        flow: of one sample.
        shapes: (K, N) of the quantizable layers.
    """
    samples, largest = min(SAMPLES_PER_BACKWARD, settings.calibration_samples), 4 * max(k * n for k, n in shapes)
    squares = max(3 * 4 * MOST_ROW_PRODUCTS, 2 * largest)
    fisher = samples * flow.block_backward_bytes(1) + squares
    # Outputs of a layer in all formats, twice, the exact one and the rounded input.
    measured = samples * (2 * len(settings.formats) + 2) * flow.largest_bytes + _ROUNDED * largest
    return fisher, samples * flow.block_backward_bytes(settings.projections) + measured


def state_bytes(settings: Settings, model: Model) -> tuple[int, int, int]:
    """Estimate the bytes of the states of loops: latents, and the clean ones that multistep schedulers carry.

    Args:
        settings: of the run.
        model: its model.

    Returns:
        A batch's loop, as it is made and as one tensor; the gradients of its states; the states of a beam's paths.
    """
    state, calibrated = (1 + model.carried) * model.latent_bytes, settings.calibration_samples
    loop = (settings.steps + 1) * state
    paths = settings.beam * (settings.candidates + 1) * calibrated * state
    return 2 * _most_samples(settings) * loop, settings.projections * calibrated * loop, paths


def _clip_bytes(settings: Settings, flow: Flow, shapes: Sequence[tuple[int, int]]) -> int:
    """Estimate the least bytes of the backward sweep for the ratios that clip."""
    if settings.clips == "none" or not clipped_grids(format_named(name) for name in settings.formats):
        return 0
    samples = min(SAMPLES_PER_BACKWARD, settings.calibration_samples)
    # Gradients that have been pulled back to a layer's inputs, these, and what rounding changes of them.
    measured = samples * (PROJECTIONS + 4) * flow.largest_bytes + _ROUNDED * 4 * max(k * n for k, n in shapes)
    return samples * flow.block_backward_bytes(PROJECTIONS) + measured


def gradient_bytes(settings: Settings, flow: Flow, blocks: Sequence[Sequence[tuple[int, int]]]) -> int:
    """Estimate the least bytes of Hessians from gradients: a block's sums and file, and the gradients of one sample.

    Args:
        settings: of the run.
        flow: of one sample.
        blocks: (K, N) of their quantizable layers.
    """
    if settings.hessian not in gradients.FORMS:
        return 0
    samples, coherent = min(SAMPLES_PER_BACKWARD, settings.calibration_samples), settings.hessian == gradients.COHERENT
    kept = [
        sums_bytes([width for width, _ in block])
        + sum(sample_bytes(pair, gradients.PROJECTIONS, coherent) for pair in block)
        + 2 * sum(4 * width**2 for width, _ in block)
        for block in blocks
    ]
    return samples * flow.block_backward_bytes(gradients.PROJECTIONS) + max(kept)


def count_encodings(adapter: ModelAdapter) -> int:
    """Numbers in the encodings of all prompts, of which only the shapes need to be known."""
    tensors = adapter.encode([0]).conditional.values()
    return (len(adapter.prompts) + adapter.negatives) * sum(tensor.numel() for tensor in tensors)


def _model(settings: Settings, outline: LoadedModel, pipeline: OpenedPipeline | None) -> Model:
    adapter = outline.adapter
    linears = adapter.quantizable_layers()
    shapes = tuple(
        tuple((linears[name].in_features, linears[name].out_features) for name in names)
        for names in adapter.layers_by_block().values()
    )
    schedule = adapter.schedule(settings.asked_steps)
    flow = measure_flow(adapter, schedule, settings.guidance)
    weights = count_weights(adapter.transformer)
    loading = (0, 4 * weights, 0, True)
    if pipeline is not None:
        copied = pipeline.mapped_types != {getattr(torch, settings.base_type)}
        loading = (pipeline.encoder_bytes, pipeline.resident_bytes, pipeline.file_bytes, copied)
    latent_bytes = torch.float32.itemsize * prod(adapter.latent_shape)
    return Model(weights, shapes, flow, count_encodings(adapter), *loading, latent_bytes, schedule.solver.memory)


def _call_bytes(settings: Settings, flow: Flow) -> int:
    """Estimate the bytes that a call of the model in full precision needs for the largest batch."""
    return _most_samples(settings) * _ALIVE * flow.largest_bytes


def _most_samples(settings: Settings) -> int:
    """Samples of the largest batch that is denoised at once."""
    judged = min(SAMPLES_PER_CALL, max(settings.selection_samples, settings.held_out_samples))
    return max(settings.calibration_samples, judged)

"""Methods of others in the formats of a target, from their publications, on this project's grids.

modelopt's NVFP4 wants CUDA, so what it does is done here by its published rules (version 0.47).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor
from torch.nn import functional

from adatsq_trt.calibration.fisher import LayerGradients, projections
from adatsq_trt.calibration.transforms.low_rank import branch
from adatsq_trt.calibration.transforms.smooth import divisor
from adatsq_trt.calibration.transforms.statistics import LayerGroup, largest_inputs, measure_groups
from adatsq_trt.calibration.units import Measured, backward_sweep
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import Format
from adatsq_trt.models.capture import captured
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.rounding import round_input, stored_weight
from adatsq_trt.quantizers import dequantize_weight, quantize_nearest, static_activation_scale
from adatsq_trt.search.sensitivity import Candidates
from adatsq_trt.solver import State
from adatsq_trt.stages import calibrate, quantize
from adatsq_trt.stages.context import Context
from adatsq_trt.transforms import InputMap, LayerTransform

# Of an input's rows at a step, those on which SVDQuant's smoothing is chosen.
ROWS = 128
# Smoothing strengths that SVDQuant tries.
STRENGTHS = tuple(i / 10 for i in range(11))
# The rule of users, for HunyuanVideo's 50 steps: the first four and the last in more bits (unslothai/unsloth #10729).
FIRST, LAST, OF_STEPS = 4, 1, 50


def max_calibrated(context: Context, fmt: Format) -> CandidateWeights:
    """NVFP4 as modelopt's NVFP4_DEFAULT_CFG makes it: from largest magnitudes, those of inputs over all steps.

    Weights are rounded to nearest, with block scales amax / 6 beside amax / (6 * 448); inputs likewise, in blocks that
    are measured at every call.
    """
    weights = {
        name: quantize_nearest(linear.weight.detach(), fmt)
        for name, linear in context.adapter.quantizable_layers().items()
    }
    largest = read_tensors(calibrate.stage(context).folder / calibrate.STATISTICS)["largest"]
    overall = largest.amax(dim=0, keepdim=True).expand_as(largest)
    return CandidateWeights({fmt.name: weights}, {fmt.name: static_activation_scale(overall, fmt.activation)})


def protected_steps(steps: int) -> tuple[int, ...]:
    """Steps that users keep in more bits: the first four of 50 and the last, at least one of each."""
    first = min(max(round(FIRST * steps / OF_STEPS), 1), steps)
    return tuple(sorted({*range(first), *range(steps - LAST, steps)}))


# ------------------------------------------------------------------------------------------------ SVDQuant


def svdquant(context: Context, fmt: Format) -> CandidateWeights:
    """SVDQuant (Li et al. 2025): smoothing, a 16-bit branch of rank 32 in 3,072, GPTQ of what is left.

    Smoothing strengths are tried for each input with activations and weights rounded, and that of the least error of
    the layers' outputs is kept. GPTQ's Hessian is the plain one.
    """
    latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"]
    inputs, transforms = _some_inputs(context, latents), dict[str, LayerTransform]()
    for group in measure_groups(context.calibration, latents):
        transforms |= _smoothed(group, inputs[next(iter(group.weights))], fmt)
    hessians = calibrate.load_hessians(context, calibrate.PLAIN_HESSIANS)
    weights = quantize.solve(context, fmt, hessians, transforms)
    scales = {}
    if fmt.static_activation:
        largest = largest_inputs(context.calibration, latents, transforms)
        scales = {fmt.name: static_activation_scale(largest, fmt.activation)}
    return CandidateWeights({fmt.name: weights}, scales, transforms)


@torch.no_grad()
def _some_inputs(context: Context, latents: Tensor) -> dict[str, Tensor]:
    """Module path → some rows of its input at every step, float32 [steps, ROWS at most, K]."""
    linears, generator = context.adapter.quantizable_layers(), torch.Generator().manual_seed(context.settings.seed)
    found: dict[str, list[Tensor]] = {name: [] for name in linears}
    for step in range(context.settings.steps):
        with captured(linears) as capture:
            context.calibration.velocity(latents[step], step)
        for name, given in capture.inputs.items():
            rows = given.flatten(0, -2)
            found[name].append(rows[torch.randperm(len(rows), generator=generator)[:ROWS]])
    return {name: torch.stack(rows) for name, rows in found.items()}


def _smoothed(group: LayerGroup, x: Tensor, fmt: Format) -> dict[str, LayerTransform]:
    """The transforms of the layers that are given one input, with the strength of least error.

    Args:
        group: the layers.
        x: some rows of their input, float32 [steps, rows, K].
        fmt: of weights and inputs.
    """
    largest, best, least = group.largest.amax(dim=0), dict[str, LayerTransform](), np.inf
    for strength in (None, *STRENGTHS):
        scale = None if strength is None else divisor(largest, group.largest_weight, strength)
        input_map = InputMap(divisor=scale)
        own = {n: LayerTransform(input_map, branch(input_map.weight(w))) for n, w in group.weights.items()}
        error = sum(_output_error(group, name, transform, x, fmt) for name, transform in own.items())
        if error < least:
            best, least = own, error
    return best


def _output_error(group: LayerGroup, name: str, transform: LayerTransform, x: Tensor, fmt: Format) -> float:
    """Squared error of a layer's output, as a part of that output's square."""
    weight, input_map = group.weights[name], transform.input_map
    mapped = input_map.inputs(x)
    scale = _scales(input_map.inputs(group.largest), fmt)
    rounded = torch.stack([round_input(row, fmt.activation, s) for row, s in zip(mapped, scale, strict=True)])
    remainder = dequantize_weight(quantize_nearest(transform.rounded_weight(weight), fmt), fmt)
    exact, own = functional.linear(x, weight), functional.linear(rounded, remainder)
    assert transform.branch is not None
    own = own + functional.linear(functional.linear(mapped, transform.branch.down), transform.branch.up)
    return float((own - exact).square().sum() / exact.square().sum().clamp(min=1e-30))


def _scales(largest: Tensor, fmt: Format) -> Sequence[Tensor | None]:
    """Static scale of each step from the largest inputs [steps, K]; None for dynamic ones."""
    if not fmt.static_activation:
        return [None] * len(largest)
    return list(static_activation_scale(largest.amax(dim=1), fmt.activation))


# -------------------------------------------------------------------------------------------- AutoQuantize


@dataclass(frozen=True)
class LayerChoice:
    """Scores and sizes that AutoQuantize decides from.

    Attributes:
        scores: float64 [formats, layers].
        bits: of each format per weight.
        weights: of each layer, int64 [layers].
    """

    scores: NDArray[np.float64]
    bits: tuple[float, ...]
    weights: NDArray[np.int64]

    def allocate(self, effective_bits: float) -> NDArray[np.int64]:
        """Choose a format for each layer: the least sum of scores whose bits keep the mean, as an integer program.

        Args:
            effective_bits: most bits per weight.
        """
        formats, layers = self.scores.shape
        cost = np.array(self.bits)[:, None] * self.weights
        one_each = np.tile(np.eye(layers), formats)
        solved = milp(
            self.scores.ravel(),
            constraints=[
                LinearConstraint(cost.ravel()[None], -np.inf, effective_bits * self.weights.sum()),
                LinearConstraint(one_each, 1, 1),
            ],
            integrality=np.ones(formats * layers),
            bounds=Bounds(0, 1),
        )
        assert solved.x is not None, "the cheapest format keeps the mean"
        chosen: NDArray[np.int64] = solved.x.reshape(formats, layers).argmax(axis=0)
        return chosen


def layer_choice(context: Context, store: CandidateWeights, formats: Sequence[Format]) -> LayerChoice:
    """Scores as modelopt's AutoQuantize takes them: Σ (∂L/∂Y ΔY)² over all outputs of a layer, samples and steps.

    L is a projection of the final latent, so a step's effect on the picture counts: modelopt asks its user for a loss.
    """
    settings, samples = context.settings, context.calibration
    latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"]
    start = projections(len(samples.seeds), context.adapter.latent_shape, settings.projections, settings.seed)
    measured = Measured(samples, Candidates(tuple(formats), store), context.by_block(settings.projections))
    common, total = context.executor.share(measured), torch.zeros(len(context.layers), len(formats))
    last = settings.steps - 1
    for swept in backward_sweep(context.executor, common, squared_changes, latents, State(start), last):
        total += torch.stack(swept.measured).sum(dim=0)
    linears = context.adapter.quantizable_layers().values()
    widths = [linear.in_features for linear in linears]
    # modelopt counts 4.5 bits for NVFP4 and 8 for FP8.
    bits = tuple(fmt.weight.bits + (0.5 if fmt.weight.group_size else 0.0) for fmt in formats)
    weights = np.array([w * linear.out_features for w, linear in zip(widths, linears, strict=True)])
    return LayerChoice(total.double().mT.numpy(), bits, weights)


@torch.no_grad()
def squared_changes(common: Measured[Candidates], layers: LayerGradients) -> dict[str, Tensor]:
    """Σ (∂L/∂Y ΔY)² of some layers at a step, float32 [formats]."""
    adapter, store, result = common.samples.adapter, common.extra.store, {}
    for index, (layer, linear) in enumerate(adapter.quantizable_layers().items()):
        if layer not in layers.inputs:
            continue
        x, gradients = layers.inputs[layer].float(), layers.gradients[layer].float()
        exact = functional.linear(x, linear.weight.float())
        scores = []
        for fmt in common.extra.formats:
            rounded = round_input(x, fmt.activation, store.scale(fmt, layers.step, index))
            change = functional.linear(rounded, stored_weight(store.weights[fmt.name][layer], fmt)) - exact
            scores.append((gradients * change).square().sum())
        result[layer] = torch.stack(scores)
    return result

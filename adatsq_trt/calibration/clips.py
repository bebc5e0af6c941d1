"""How much of an activation's largest magnitude a scale keeps, for every step and layer.

A smaller scale rounds most numbers more finely and clips a few. With Δx = Q(x) - x, a layer's output errs by Δx Wᵀ, and
the picture, to first order, by g · Δx Wᵀ with the gradient g = ∂(uᵀ x_T) / ∂y of the token. The ratio that is kept
minimizes

    E_{sample, u} [ Σ_tokens (g · Δx Wᵀ)² ] = E [ Σ_tokens ((gᵀ W) · Δx)² ].

Squares are taken by token: errors of different tokens hardly go together, and a sum over them would be noise. Layers
that are given the same tensor keep the same part of it, since it is rounded once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.fisher import LayerGradients
from adatsq_trt.calibration.units import Measured
from adatsq_trt.execution.precision import exact
from adatsq_trt.formats import Format, Grid
from adatsq_trt.models.rounding import round_input
from adatsq_trt.quantizers import static_activation_scale
from adatsq_trt.transforms import IDENTITY, LayerTransform

# Parts of the largest magnitude that are tried; exact in every 16-bit type.
RATIOS = tuple(count / 16 for count in range(16, 5, -1))
# Random projections per sample: enough to tell ratios apart, since squares are added up over all tokens.
PROJECTIONS = 2


@dataclass(frozen=True)
class ClipSearch:
    """Inputs of the search for clip ratios: activation grids, largest magnitudes and transforms.

    Attributes:
        grids: of activations.
        largest: largest magnitude of every layer's transformed input, float32 [steps, layers].
        transforms: module path → transform of the layer, where there is one.
    """

    grids: tuple[Grid, ...]
    largest: Tensor
    transforms: Mapping[str, LayerTransform]


def clipped_grids(formats: Iterable[Format]) -> tuple[Grid, ...]:
    """The distinct activation grids whose ratios are searched: of few integers with dynamic scales.

    e4m3 keeps its resolution whatever the scale, blocks of e2m1 have their own scales, and 8 bits with a static scale
    lose more by the samples that become other pictures than they gain by all others (decision 0046).
    """
    wanted = (f.activation for f in formats if f.scaled_activation and f.activation.dynamic)
    return tuple(dict.fromkeys(wanted))


def scale_with(ratio: float | Tensor, largest: Tensor, grid: Grid) -> Tensor:
    """Turn a clip ratio into a grid's scale; a dynamic grid takes the ratio itself. Float32, shape of `largest`.

    Args:
        ratio: part of `largest` that is kept; a number, or float32 of the shape of `largest`.
        largest: magnitude of the inputs, float32.
        grid: of activations.
    """
    kept = torch.ones_like(largest) * ratio
    return kept if grid.dynamic else static_activation_scale(largest * kept, grid)


def clip_errors(common: Measured[ClipSearch], layers: LayerGradients) -> dict[str, Tensor]:
    """The criterion of some samples at a step: float64 [grids, ratios], summed over samples and projections."""
    adapter, search = common.samples.adapter, common.extra
    errors = {}
    with exact(adapter.device.type):
        for index, (layer, linear) in enumerate(adapter.quantizable_layers().items()):
            if layer not in layers.inputs:
                continue
            transform = search.transforms.get(layer, IDENTITY)
            inputs = transform.input_map.inputs(layers.inputs[layer].float())
            pulled = layers.gradients[layer].float() @ transform.rounded_weight(linear.weight.detach().float())
            largest = search.largest[layers.step, index]
            errors[layer] = torch.stack(
                [
                    torch.stack([_error(inputs, pulled, grid, scale_with(r, largest, grid)) for r in RATIOS])
                    for grid in search.grids
                ]
            )
    return errors


def _error(inputs: Tensor, pulled: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    change = round_input(inputs, grid, scale).float() - inputs
    return (pulled * change).sum(dim=-1).double().square().sum()


def best_ratios(errors: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The ratios with the smallest criterion, the largest of equals.

    Args:
        errors: float64 [steps, layers, grids, ratios].
        groups: indices of layers that are given the same tensor.

    Returns:
        float32 [grids, steps, layers].
    """
    shared = errors.clone()
    for group in groups:
        shared[:, list(group)] = errors[:, list(group)].sum(dim=1, keepdim=True)
    # argmin may give any of equals; the first of them is asked for.
    first = (shared == shared.amin(dim=-1, keepdim=True)).int().argmax(dim=-1)
    return torch.tensor(RATIOS)[first].permute(2, 0, 1).contiguous()

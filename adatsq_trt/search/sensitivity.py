"""Effect of each format, at each step and layer, on the final picture: a second-order estimate for screening.

Rounding layer l at step t to format f changes its output by ΔY = Q(X) Ŵᵀ - X Wᵀ. With the gradient G = ∂(uᵀ x_T)/∂Y
from the backward sweep, the change of the projected picture is, to first order, the signed number

    c[f,t,l,r] = Σ G * ΔY                        (row r = one projection u of one sample),

so E_r[c²] is the squared error of the final latent if nothing else is rounded. Errors of several roundings add up
inside the square: E_r[(Σ c)²], which is how one weight's error accumulates over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adatsq_trt.calibration.fisher import LayerGradients
from adatsq_trt.calibration.units import Measured
from adatsq_trt.execution.precision import exact
from adatsq_trt.formats import Format
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.rounding import round_input, stored_weight
from adatsq_trt.search.active import Active, parts

# Steps of a trajectory whose neighbours are averaged with a width of one step.
SMOOTHED_STEPS = 20
# A sample that is so many times as sensitive as the median one has half of its weight taken away.
SATURATION = 2.0


@dataclass(frozen=True)
class Sensitivity:
    """First-order contributions to the final latent's error.

    Attributes:
        formats: cheapest first.
        contributions: c scaled so that squares sum to a latent MSE: float32 [formats, steps, layers, rows].
        samples: rows are [projections, samples], flattened.
        cells: [steps, layers]: which layers run at which step; None for all. Contributions of the others are 0.
    """

    formats: tuple[Format, ...]
    contributions: Tensor
    samples: int = 1
    cells: Active | None = None

    @property
    def active(self) -> Active:
        """[steps, layers]: which layers run at which step."""
        return np.ones(self.contributions.shape[1:3], dtype=bool) if self.cells is None else self.cells

    def of_formats(self, indices: Sequence[int]) -> Sensitivity:
        """That of some formats, by their indices."""
        formats = tuple(self.formats[i] for i in indices)
        return replace(self, formats=formats, contributions=self.contributions[list(indices)])

    @property
    def errors(self) -> Tensor:
        """Latent MSE of each rounding alone, float64 [formats, steps, layers]."""
        return self.contributions.double().square().sum(dim=-1)

    def row_weights(self) -> Tensor:
        """Factors that keep a few samples from deciding everything, float64 [rows]; their squares have the mean 1.

        The first-order error of a sample grows with its sensitivity d without bound, but a real one saturates: at worst
        the sample becomes another picture. So its squares are weighted by 1 / (1 + d / SATURATION), where d is relative
        to the median sample. On digits-flux one sample of 64 had a quarter of all predicted error and a seventieth of
        the measured one.
        """
        energy = self.contributions.double().square().sum(dim=(1, 2)).unflatten(1, (-1, self.samples)).sum(dim=1)
        median = energy.median(dim=1, keepdim=True).values
        relative = (energy / median)[median[:, 0] > 0]  # exact formats say nothing
        sensitivity = relative.mean(dim=0) if len(relative) else torch.zeros(self.samples, dtype=torch.float64)
        weights = 1 / (1 + sensitivity / SATURATION)
        return (weights / weights.mean()).sqrt().repeat(self.contributions.shape[-1] // self.samples)

    def saturated(self) -> Sensitivity:
        """The same with `row_weights` applied."""
        return replace(self, contributions=self.contributions * self.row_weights().float())

    def smoothed_errors(self) -> Tensor:
        """`errors` with the logarithm averaged over neighbouring steps (Gaussian, a twentieth of the trajectory wide).

        A few dozen rows estimate a variance to ten or twenty per cent; neighbouring steps see nearly the same inputs,
        so their average is a better estimate of each. With few steps neighbours differ, and nothing is averaged. Steps
        of two experts are no neighbours.
        """
        width, errors = self.contributions.shape[1] / SMOOTHED_STEPS, self.errors
        smoothed = torch.zeros_like(errors)
        for own, layers in parts(self.active):
            logarithm = errors[:, own][:, :, layers].clamp(min=1e-30).log()
            steps = torch.arange(len(own), dtype=torch.float64)
            kernel = torch.exp(-((steps[:, None] - steps[None]) ** 2) / (2 * width**2))
            kernel = kernel / kernel.sum(dim=1, keepdim=True)
            smoothed[:, own[:, None], layers] = torch.einsum("st,ftl->fsl", kernel, logarithm).exp()
        return smoothed


@dataclass(frozen=True)
class Candidates:
    """Candidate formats, whose sensitivities are measured.

    Attributes:
        formats: cheapest first.
        store: their weights and activation scales.
    """

    formats: tuple[Format, ...]
    store: CandidateWeights


def measure_contributions(common: Measured[Candidates], layers: LayerGradients) -> dict[str, Tensor]:
    """`layer_contributions` where the unit is computed: some samples."""
    adapter = common.samples.adapter
    with exact(adapter.device.type):
        return layer_contributions(layers, adapter, common.extra.formats, common.extra.store)


def join_parts(measured: Sequence[Tensor], projections: int) -> Tensor:
    """The contributions of all samples: float32 [formats, layers, projections * samples].

    Args:
        measured: of some samples each, float32 [layers, formats, projections * some samples].
        projections: how many there are.
    """
    joined = torch.cat([part.unflatten(2, (projections, -1)) for part in measured], dim=3)
    return joined.flatten(2).transpose(0, 1).contiguous()


def layer_contributions(
    layers: LayerGradients, adapter: ModelAdapter, formats: Sequence[Format], store: CandidateWeights
) -> dict[str, Tensor]:
    """The contributions of some layers at a step, unscaled: float32 [formats, projections * samples].

    Args:
        layers: their inputs and output gradients.
        adapter: the full-precision model.
        formats: candidate formats.
        store: their weights and activation scales.
    """
    result = {}
    for index, (layer, linear) in enumerate(adapter.quantizable_layers().items()):
        if layer not in layers.inputs:
            continue
        # The transform changes neither the exact output nor what its branch adds: only the rounded part errs.
        transform = store.transform(layer)
        inputs = transform.input_map.inputs(layers.inputs[layer].float())
        exact = functional.linear(inputs, transform.rounded_weight(linear.weight.float()))
        changes = []
        for fmt in formats:
            rounded = round_input(inputs, fmt.activation, store.scale(fmt, layers.step, index))
            changes.append(functional.linear(rounded, stored_weight(store.weights[fmt.name][layer], fmt)) - exact)
        gradients = layers.gradients[layer].float().flatten(2)
        result[layer] = torch.einsum("psn,fsn->fps", gradients, torch.stack(changes).flatten(2)).flatten(1)
    return result


def assemble(
    formats: Sequence[Format], steps: Mapping[int, Tensor], latent_size: int, samples: int, cells: Active | None = None
) -> Sensitivity:
    """Stack the steps and scale, so that the sum of squares over rows is a mean over the latent's elements.

    E_u[(uᵀ δ)²] = ||δ||², so MSE = mean over rows of c² / latent_size.

    Args:
        formats: cheapest first.
        steps: step → contributions of all layers, unscaled: float32 [formats, layers, rows].
        latent_size: elements of one sample's latent.
        samples: how many there are.
        cells: as of `Sensitivity`.
    """
    stacked = torch.stack([steps[t] for t in range(len(steps))], dim=1)
    return Sensitivity(tuple(formats), stacked / math.sqrt(stacked.shape[-1] * latent_size), samples, cells)

"""Second moments X Xᵀ, the terms of the weighted Hessians H'_l = Σ_t alpha[t,l] X[t,l] X[t,l]ᵀ (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import Place
from adatsq_trt.execution import Executor, Shared
from adatsq_trt.models.capture import observed_inputs


@dataclass
class LayerMoments:
    """Second moments and largest magnitudes of a layer's inputs over all steps.

    Attributes:
        weighted: H', float32 [K, K]; None where steps have no weights.
        plain: the same with equal weights, float32 [K, K].
        largest: magnitude at every step, float32 [steps]; 0 where the layer does not run.
        tokens: rows that one sample sends through the layer.
    """

    weighted: Tensor | None
    plain: Tensor
    largest: Tensor
    tokens: int = 0

    def add(self, inputs: StepInputs, step: int, alpha: Tensor | None) -> None:
        """Add a step's inputs with its weight, if any, of alpha, float32 [steps]."""
        if self.weighted is not None and alpha is not None:
            self.weighted += alpha[step] * inputs.moment
        self.plain += inputs.moment.mul(1 / len(self.largest))
        self.largest[step] = inputs.largest
        self.tokens = inputs.tokens


@dataclass(frozen=True)
class StepInputs:
    """Second moment, largest magnitude and token count of a layer's inputs at one step.

    Attributes:
        moment: mean of x xᵀ, float32 [K, K].
        largest: magnitude, float32 [].
        tokens: rows that one sample sends through the layer.
    """

    moment: Tensor
    largest: Tensor
    tokens: int


def layer_moments(
    executor: Executor,
    batch: Shared[Samples],
    latents: Tensor,
    weights: Mapping[str, Tensor | None],
    on_step: Callable[[], None],
) -> dict[str, LayerMoments]:
    """One pass over the full-precision trajectory for the layers in `weights`; only their Hessians are in memory.

    Args:
        executor: who computes; a unit is all samples at one step.
        batch: the samples.
        latents: their trajectory, float32 [steps + 1, samples, *latent_shape].
        weights: module path → alpha, float32 [steps]; None for plain moments alone.
        on_step: called after each step.
    """
    units = (
        (Place(step, slice(0, len(latent)), latent.clone()), tuple(weights)) for step, latent in enumerate(latents[:-1])
    )
    moments: dict[str, LayerMoments] = {}
    # Results come in the order of the steps, so sums are taken in that order wherever they were computed.
    for step, found in enumerate(executor.map(_step_inputs, batch, units)):
        for name in list(found):
            inputs = found.pop(name)  # or they would be there while those of the next step are made
            if name not in moments:
                zero = torch.zeros_like(inputs.moment)
                weighted = None if weights[name] is None else zero.clone()
                moments[name] = LayerMoments(weighted, zero, torch.zeros(len(latents) - 1))
            moments[name].add(inputs, step, weights[name])
        on_step()
    return {name: moments[name] for name in weights}


@torch.no_grad()
def _step_inputs(batch: Samples, unit: tuple[Place, tuple[str, ...]]) -> dict[str, StepInputs]:
    (place, layers), found = unit, dict[str, StepInputs]()
    linears = batch.adapter.quantizable_layers()

    def observe(name: str, inputs: Tensor) -> None:
        tokens = inputs.shape[:-1].numel() // len(place.latent)
        found[name] = StepInputs(second_moment(inputs), inputs.abs().max(), tokens)

    with observed_inputs({name: linears[name] for name in layers}, observe):
        batch.velocity(place.latent, place.step)
    return found


def second_moment(inputs: Tensor) -> Tensor:
    """Mean over rows of x xᵀ.

    Normalized by the number of rows, so that alpha alone decides how much a step weighs.

    Args:
        inputs: float32 [..., K].

    Returns:
        float32 [K, K].
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    return (rows.mT @ rows).div_(len(rows))


def hessian_bytes(widths: Iterable[int]) -> tuple[int, int]:
    """Bytes of some layers' Hessians, weighted, not, and of one step; and of what is being added to one of them.

    Args:
        widths: in_features of the layers.
    """
    squares = [4 * width**2 for width in widths]
    return 3 * sum(squares), 2 * max(squares)

"""Second moments X Xᵀ, the terms of the weighted Hessians H'_l = Σ_t alpha[t,l] X[t,l] X[t,l]ᵀ (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.models.capture import observed_inputs


@dataclass
class LayerMoments:
    """What a layer's inputs add up to over the steps.

    Attributes:
        weighted: H', float32 [K, K].
        plain: the same with equal weights, float32 [K, K].
        largest: magnitude at every step, float32 [steps].
        tokens: rows that one sample sends through the layer.
    """

    weighted: Tensor
    plain: Tensor
    largest: Tensor
    tokens: int = 0

    def add(self, inputs: Tensor, step: int, weight: Tensor, samples: int) -> None:
        """Add a step's inputs [..., K] with a weight, float32 []."""
        moment = second_moment(inputs)
        self.weighted += weight * moment
        self.plain += moment.mul_(1 / len(self.largest))
        self.largest[step] = inputs.abs().max()
        self.tokens = inputs.shape[:-1].numel() // samples


@torch.no_grad()
def layer_moments(
    samples: Samples, latents: Tensor, weights: Mapping[str, Tensor], on_step: Callable[[], None]
) -> dict[str, LayerMoments]:
    """One pass over the full-precision trajectory for the layers in `weights`; only their Hessians are in memory.

    Args:
        samples: the batch.
        latents: its trajectory, float32 [steps + 1, samples, *latent_shape].
        weights: module path → alpha, float32 [steps].
        on_step: called after each step.
    """
    every, steps, count = samples.adapter.quantizable_layers(), samples.schedule.steps, len(samples.seeds)
    linears = {name: every[name] for name in weights}
    moments = {}
    for name, linear in linears.items():
        square = torch.zeros(linear.in_features, linear.in_features)
        moments[name] = LayerMoments(square, torch.zeros_like(square), torch.zeros(steps))
    for step in range(steps):

        def observe(name: str, inputs: Tensor, step: int = step) -> None:
            moments[name].add(inputs, step, weights[name][step], count)

        with observed_inputs(linears, observe):
            samples.step(latents[step], step)
        on_step()
    return moments


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
    """Bytes of some layers' Hessians, weighted and not, and of the terms that are being added to one of them.

    Args:
        widths: in_features of the layers.
    """
    squares = [4 * width**2 for width in widths]
    return 2 * sum(squares), 2 * max(squares)

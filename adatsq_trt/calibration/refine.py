"""Weights for the rounded inputs that they will multiply.

A layer that is given x multiplies Q(x). With A = E[Q(x) Q(x)ᵀ] and C = E[x Q(x)ᵀ], both of the quantized model at the
steps that use the weight, the weight that errs least before it is rounded is

    argmin_V E ‖V Q(x) - W x‖² = W C A⁻¹,

which is smaller than W where rounding adds noise. GPTQ rounds a point on the way there, W + share * (W C A⁻¹ - W), with
the Hessian of calibration. The whole way makes the picture worse (decision 0046). Why was not tested; presumably what a
smaller weight takes away is taken from all tokens and steps alike and adds up, and noise does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.formats import Format
from adatsq_trt.models.simulated import SimulatedLinear, SimulatedModel

SHARE = 0.5
# Added to the diagonals of A and C, as a part of A's mean diagonal: directions without inputs stay as they are.
_DAMPING = 0.01


@dataclass(frozen=True)
class QuantizedRun:
    """Denoising under a policy, and the layers to look at.

    Attributes:
        model: fake-quantized and installed.
        samples: the batch, of which units are parts.
        formats: step → module path → format.
        layers: module paths.
    """

    model: SimulatedModel
    samples: Samples
    formats: tuple[Mapping[str, Format], ...]
    layers: tuple[str, ...]


# (module path, format) → A and C, float32 [2, K, K], summed over tokens, samples and the steps with the format.
Moments = dict[tuple[str, str], Tensor]


@torch.no_grad()
def rounded_moments(run: QuantizedRun, samples: slice) -> Moments:
    """Accumulate the moments of rounded and unrounded inputs along some samples' own trajectories."""
    found: Moments = {}
    with _observed(run.model, run.layers, found):
        trajectory(run.samples.part(samples), lambda step: run.model.assign(run.formats[step], step))
    return found


@contextmanager
def _observed(model: SimulatedModel, layers: Sequence[str], found: Moments) -> Iterator[None]:
    def observe(layer: str, linear: SimulatedLinear, x: Tensor) -> None:
        assert linear.active is not None, "every layer has a format"
        mapped, rounded = (values.flatten(0, -2).float() for values in linear.inputs(x))
        moments = torch.stack([rounded.mT @ rounded, mapped.mT @ rounded])
        key = (layer, linear.active.name)
        found[key] = found[key] + moments if key in found else moments

    handles = []
    for layer in layers:
        linear = model.adapter.transformer.get_submodule(layer)
        assert isinstance(linear, SimulatedLinear), "the model is installed"
        handles.append(
            linear.register_forward_pre_hook(lambda module, arguments, name=layer: observe(name, module, arguments[0]))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def corrected_weight(weight: Tensor, moments: Tensor, share: float = SHARE) -> Tensor:
    """W + share * (W C A⁻¹ - W).

    Args:
        weight: W, float32 [N, K].
        moments: A and C, float32 [2, K, K].
        share: of the way to the weight that errs least.

    Returns:
        float32 [N, K].
    """
    rounded, crossed = moments.double()
    damping = _DAMPING * rounded.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    identity = torch.eye(len(rounded), dtype=torch.float64, device=rounded.device)
    wide = weight.double()
    best = torch.linalg.solve(rounded + damping * identity, wide @ (crossed + damping * identity), left=False)
    corrected: Tensor = wide + share * (best - wide)
    return corrected.float()

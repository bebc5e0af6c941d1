"""Fisher information of every (step, layer) with respect to the final picture, and temporal weights.

The loss. A full-precision model scored against its own output has no gradient, so the Gauss-Newton form is used: the
final latent x_T is projected on a unit Gaussian u,

    L = uᵀ x_T,      I[t,l] = E_{sample, u} [ Σ (∂L/∂W[t,l])² ],                    (paper, section 3.3)

where W[t,l] is layer l's weight as used at step t alone. E_u of the squared gradient is the squared Frobenius norm of
the Jacobian of the *final* picture, so an early step's influence through all later steps is counted. One backward
sweep over the trajectory gives all steps: with the adjoint a_t = ∂L/∂x_t and the Euler step
x_{t+1} = x_t + (σ_{t+1} - σ_t) v(x_t, t),

    a_T = u,      a_t = a_{t+1} + (σ_{t+1} - σ_t) (∂v/∂x_t)ᵀ a_{t+1}.

The adjoints are kept: aᵀ δ predicts, to first order, what an error δ at step t does to the final picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.models.adapter import guide
from adatsq_trt.models.capture import captured


@dataclass(frozen=True)
class BackwardStep:
    """One step of the backward sweep.

    Attributes:
        step: index in the loop.
        adjoint: a_t, float32 [projections, samples, *latent_shape].
        inputs: module path → layer input [samples, rows, K], float32 or what autocast makes of it; rows are the tokens
            of both guidance branches.
        gradients: module path → ∂L/∂(layer output), of the same type, [projections, samples, rows, N].
    """

    step: int
    adjoint: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def projections(samples: int, latent_shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Unit Gaussians u, float32 [count, samples, *latent_shape]."""
    return torch.randn(count, samples, *latent_shape, generator=torch.Generator().manual_seed(seed))


def backward_step(samples: Samples, latent: Tensor, adjoint: Tensor, step: int) -> BackwardStep:
    """One step of the adjoint recursion.

    Args:
        samples: the batch.
        latent: x_t of its full-precision trajectory, float32 [samples, *latent_shape].
        adjoint: a_{t + 1}, float32 [projections, samples, *latent_shape]; u itself after the last step of all.
        step: t.
    """
    latent = latent.clone().requires_grad_(True)
    with captured(samples.adapter.quantizable_layers()) as capture, torch.enable_grad():
        inputs, following = _differentiable_step(samples, latent, step)
        adjoints, gradients = [], dict[str, Tensor]()
        for number, row in enumerate(adjoint):
            final = number == len(adjoint) - 1  # frees the step's graph
            loss = (following * row).sum()
            adjoints.append(torch.autograd.grad(loss, [latent, *inputs], retain_graph=not final)[0])
            for name in list(capture.output_gradients):  # each is freed as soon as it is in its place
                gradient = _by_sample(capture.output_gradients.pop(name), len(latent))
                if name not in gradients:
                    gradients[name] = gradient.new_empty(len(adjoint), *gradient.shape)
                gradients[name][number] = gradient
    return BackwardStep(
        step,
        torch.stack(adjoints),
        {name: _by_sample(value, len(latent)) for name, value in capture.inputs.items()},
        gradients,
    )


def _differentiable_step(samples: Samples, latent: Tensor, step: int) -> tuple[list[Tensor], Tensor]:
    """The model's inputs and x_{t+1}; all inputs ask for gradients, so layers that never see the latent are reached."""
    adapter, schedule, conditioning = samples.adapter, samples.schedule, samples.conditioning
    inputs = adapter.guided_inputs(latent, schedule.model_time(step), conditioning, samples.guidance)
    inputs = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in inputs.items()}
    velocity = guide(adapter.predict(inputs), conditioning, samples.guidance)
    return list(inputs.values()), schedule.advance(latent, velocity, step)


def _by_sample(value: Tensor, samples: int) -> Tensor:
    """[branches * samples, (tokens,) width] → [samples, branches * tokens, width]."""
    rows = value if value.dim() == 3 else value[:, None]
    split: Tensor = rows.unflatten(0, (-1, samples)).transpose(0, 1)
    return split.flatten(1, 2)


def squared_weight_gradient(inputs: Tensor, gradients: Tensor) -> Tensor:
    """||Gᵀ X||² per sample without forming the weight gradient: the sum of (X Xᵀ) * (G Gᵀ).

    Args:
        inputs: X, float32 [samples, rows, K].
        gradients: G, float32 [..., samples, rows, N].

    Returns:
        float32 [..., samples].
    """
    return ((inputs @ inputs.mT) * (gradients @ gradients.mT)).sum(dim=(-2, -1))


def temporal_weights(information: Tensor, temperature: float) -> Tensor:
    """alpha[t,l] = softmax over t of I[t,l] / (tau * mean over t of I[t,l])            (paper, section 3.3).

    Dividing by the layer's mean makes tau a pure number: at tau → ∞ all steps weigh the same.

    Args:
        information: I, float32 [steps, layers].
        temperature: tau > 0.

    Returns:
        float32 [steps, layers]; columns sum to 1.
    """
    relative = information / information.mean(dim=0, keepdim=True).clamp(min=torch.finfo(information.dtype).tiny)
    return torch.softmax(relative / temperature, dim=0)

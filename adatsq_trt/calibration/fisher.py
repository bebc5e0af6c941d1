"""Fisher information of every (step, layer) with respect to the final picture, and temporal weights.

The loss. A full-precision model scored against its own output has no gradient, so the Gauss-Newton form is used: the
final latent x_T is projected on a unit Gaussian u,

    L = uᵀ x_T,      I[t,l] = E_{sample, u} [ Σ (∂L/∂W[t,l])² ],                    (paper, section 3.3)

where W[t,l] is layer l's weight as used at step t alone. E_u of the squared gradient is the squared Frobenius norm of
the Jacobian of the *final* picture, so an early step's influence through all later steps is counted. One backward
sweep over the trajectory gives all steps: with the adjoint a_t = ∂L/∂x_t and the scheduler's step
x_{t+1} = α_t x_t + β_t v(x_t, t) (`solver.Update`; Euler's method has α = 1 and β = σ_{t+1} - σ_t),

    a_T = u,      a_t = α_t a_{t+1} + β_t (∂v/∂x_t)ᵀ a_{t+1}.

A step that combines clean latents d_s = x_s - σ_s v_s of earlier steps, with γ_k d_{t-k}, hands them on to the next:
the state is (x_t, d_{t-1}, …), and with its adjoint (a_t, b_{t,1}, …), b_{T,k} = 0,

    a_t = α_t a_{t+1} + b_{t+1,1} + (∂v/∂x_t)ᵀ (β_t a_{t+1} - σ_t b_{t+1,1}),      b_{t,k} = γ_k a_{t+1} + b_{t+1,k+1}.

The adjoints are kept: aᵀ δ predicts, to first order, what an error δ at step t does to the final picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.models.adapter import OUTSIDE
from adatsq_trt.models.blocks import BlockCall, LeafGradients, cut_at_blocks
from adatsq_trt.models.capture import Capture, captured
from adatsq_trt.solver import State

# Numbers in the products of all rows of a batch with each other, such as are worth keeping at once.
MOST_ROW_PRODUCTS = 1 << 24


@dataclass(frozen=True)
class LayerGradients:
    """Inputs of some layers at a step, and the gradients of the loss with respect to their outputs.

    Attributes:
        step: index in the loop.
        inputs: module path → layer input [samples, rows, K], float32 or what autocast makes of it; rows are the tokens
            of both guidance branches.
        gradients: module path → ∂L/∂(layer output), of the same type, [projections, samples, rows, N].
    """

    step: int
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


Visit = Callable[[LayerGradients], None]


def projections(samples: int, latent_shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Unit Gaussians u, float32 [count, samples, *latent_shape]."""
    return torch.randn(count, samples, *latent_shape, generator=torch.Generator().manual_seed(seed))


def backward_step(
    samples: Samples, latent: Tensor, adjoint: State[Tensor], step: int, visit: Visit, by_block: bool = False
) -> State[Tensor]:
    """One step of the adjoint recursion.

    Args:
        samples: the batch.
        latent: x_t of its full-precision trajectory, float32 [samples, *latent_shape].
        adjoint: of the state after the step, float32 [projections, samples, *latent_shape]; u itself after the last
            step of all.
        step: t.
        visit: is shown every quantizable layer that runs at the step once: all together, or the layers of one block
            after the other.
        by_block: whether one block at a time is kept for its gradients; each is called twice for that. The numbers are
            the same.

    Returns:
        That of the state before it, float32 [projections, samples, *latent_shape].
    """
    latent = latent.clone().requires_grad_(True)
    # Of a layer outside of the blocks gradients would be summed in another order.
    whole = not by_block or OUTSIDE in samples.adapter.layers_by_block()
    way = _at_once if whole else _through_blocks
    with torch.enable_grad():
        own = way(samples, latent, adjoint, step, visit)
    return State(own, samples.schedule.solver.adjoint_of_clean(adjoint, step))


def _at_once(samples: Samples, latent: Tensor, adjoint: State[Tensor], step: int, visit: Visit) -> Tensor:
    count = len(adjoint.latent)
    with captured(samples.adapter.quantizable_layers()) as capture:
        inputs, following = _differentiable_step(samples, latent, step)
        adjoints, gradients = [], _Rows(count, len(latent))
        for number in range(count):
            final = number == count - 1  # frees the step's graph
            values, rows = _pairs(following, adjoint, number)
            adjoints.append(torch.autograd.grad(values, [latent, *inputs], rows, retain_graph=not final)[0])
            gradients.take(capture, number)
    visit(LayerGradients(step, _by_sample_all(capture.inputs, len(latent)), gradients.by_layer))
    return torch.stack(adjoints)


def _through_blocks(samples: Samples, latent: Tensor, adjoint: State[Tensor], step: int, visit: Visit) -> Tensor:
    """Between the blocks gradients go backwards as usual; a block is called again when its outputs have theirs."""
    layers, groups = samples.adapter.quantizable_layers(), samples.adapter.layers_by_block()
    with cut_at_blocks(samples.adapter) as calls:
        _, following = _differentiable_step(samples, latent, step)
    count = len(adjoint.latent)
    leaves = LeafGradients([latent, *(x for call in calls for x in call.outputs)], count)
    for number in range(count):
        leaves.send(number, *_pairs(following, adjoint, number))
    while calls:
        call = calls.pop()
        own = {name: layers[name] for name in groups.get(call.block, ())}
        # Nothing refers to a block's gradients but its visit, which has them when the block's graph is gone.
        visit(LayerGradients(step, *_through_block(call, own, leaves, len(latent))))
    return torch.stack([leaves.of(number, latent) for number in range(count)])


def _pairs(following: State[Tensor], adjoint: State[Tensor], number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a step makes and the loss depends on, and a projection's gradients with respect to them."""
    gradients = [rows[number] for rows in (adjoint.latent, *adjoint.clean[:1])]
    return [following.latent, *following.clean][: len(gradients)], gradients


def _through_block(
    call: BlockCall, layers: Mapping[str, nn.Linear], leaves: LeafGradients, samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Send what has arrived at a block's outputs through it; its layers' inputs and gradients (`LayerGradients`)."""
    sent, gradients = [], _Rows(leaves.rows, samples)
    with captured(layers) as capture:
        inputs, outputs = call.repeat()
        for row in range(leaves.rows):
            reached = [i for i, leaf in enumerate(call.outputs) if leaves.reached(row, leaf)]
            given = [leaves.of(row, call.outputs[i]) for i in reached]
            some = [outputs[i] for i in reached]
            sent.append(torch.autograd.grad(some, inputs, given, retain_graph=True, allow_unused=True))
            gradients.take(capture, row)
    leaves.drop(call.outputs)
    for row, found in enumerate(sent):
        pairs = [(x, gradient) for x, gradient in zip(call.inputs, found, strict=True) if gradient is not None]
        leaves.send(row, [x for x, _ in pairs], [gradient for _, gradient in pairs])
    return _by_sample_all(capture.inputs, samples), gradients.by_layer


class _Rows:
    """Gradients of layers' outputs, put together from one projection after the other."""

    def __init__(self, count: int, samples: int) -> None:
        self._count, self._samples = count, samples
        self.by_layer: dict[str, Tensor] = {}

    def take(self, capture: Capture, number: int) -> None:
        """Move what was captured of a projection to its place; each is freed as soon as it is there."""
        for name in list(capture.output_gradients):
            gradient = _by_sample(capture.output_gradients.pop(name), self._samples)
            if name not in self.by_layer:
                self.by_layer[name] = gradient.new_empty(self._count, *gradient.shape)
            self.by_layer[name][number] = gradient


def _differentiable_step(samples: Samples, latent: Tensor, step: int) -> tuple[list[Tensor], State[Tensor]]:
    """The model's inputs, and x_{t+1} and d_t without what earlier steps give to them.

    All inputs ask for gradients, so layers that never see the latent are reached.
    """
    adapter, schedule, conditioning = samples.adapter_at(step), samples.schedule, samples.conditioning
    guidance = samples.guidance_at(step)
    inputs = adapter.guided_inputs(latent, schedule.model_time(step), conditioning, guidance)
    inputs = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in inputs.items()}
    velocity = adapter.guide(adapter.predict(inputs), len(latent), guidance)
    return list(inputs.values()), schedule.solver.own_part(latent, velocity, step)


def _by_sample_all(values: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    return {name: _by_sample(value, samples) for name, value in values.items()}


def _by_sample(value: Tensor, samples: int) -> Tensor:
    """[branches * samples, (tokens,) width] → [samples, branches * tokens, width]."""
    rows = value if value.dim() == 3 else value[:, None]
    split: Tensor = rows.unflatten(0, (-1, samples)).transpose(0, 1)
    return split.flatten(1, 2)


def squared_weight_gradient(inputs: Tensor, gradients: Tensor) -> Tensor:
    """||Gᵀ X||² per sample, without forming the weight gradient where rows are few: the sum of (X Xᵀ) * (G Gᵀ).

    Args:
        inputs: X, float32 [samples, rows, K].
        gradients: G, float32 [..., samples, rows, N].

    Returns:
        float32 [..., samples].
    """
    if len(inputs) * inputs.shape[1] ** 2 <= MOST_ROW_PRODUCTS:
        return ((inputs @ inputs.mT) * (gradients @ gradients.mT)).sum(dim=(-2, -1))
    pairs = zip(inputs, gradients.unbind(-3), strict=True)
    return torch.stack([(own.mT @ x).square().sum(dim=(-2, -1)) for x, own in pairs], dim=-1)


def proportional_weights(information: Tensor) -> Tensor:
    """alpha[t,l] = I[t,l] / sum over t of I[t,l]; the same for all steps where a layer has no information.

    Args:
        information: I, float32 [steps, layers].

    Returns:
        float32 [steps, layers]; columns sum to 1.
    """
    total = information.sum(dim=0, keepdim=True)
    return torch.where(total > 0, information / total, 1 / len(information))


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

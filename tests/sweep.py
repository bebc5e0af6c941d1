"""The backward sweep over a whole batch, which the package takes in parts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from adatsq_trt.calibration.fisher import LayerGradients, backward_step
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.solver import State


@dataclass(frozen=True)
class BackwardStep(LayerGradients):
    """All layers at a step, with the adjoint before it, of float32 [projections, samples, *latent_shape]."""

    adjoint: State[Tensor]


def backward_steps(
    samples: Samples, latents: Tensor, adjoint: State[Tensor], last: int, by_block: bool = False
) -> Iterator[BackwardStep]:
    """From step `last` to the first."""
    for step in range(last, -1, -1):
        shown: list[LayerGradients] = []
        adjoint = backward_step(samples, latents[step], adjoint, step, shown.append, by_block)
        inputs = {name: x for layers in shown for name, x in layers.inputs.items()}
        gradients = {name: x for layers in shown for name, x in layers.gradients.items()}
        assert len(inputs) == sum(len(layers.inputs) for layers in shown), "a layer was shown twice"
        yield BackwardStep(step, inputs, gradients, adjoint)

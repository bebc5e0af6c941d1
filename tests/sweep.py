"""The backward sweep over a whole batch, which the package takes in parts."""

from collections.abc import Iterator

from torch import Tensor

from adatsq_trt.calibration.fisher import BackwardStep, backward_step
from adatsq_trt.calibration.trajectory import Samples


def backward_steps(samples: Samples, latents: Tensor, adjoint: Tensor, last: int) -> Iterator[BackwardStep]:
    """From step `last` to the first."""
    for step in range(last, -1, -1):
        backward = backward_step(samples, latents[step], adjoint, step)
        yield backward
        adjoint = backward.adjoint

"""Hessians from the gradient of the one weight that all steps share.

If a layer's weight errs by ΔW at every step, the projected final latent L = uᵀ x_T changes to first order by

    Σ_t Σ_rows g_t ΔW x_t  =  <ΔW, M>,      M = Σ_t G_tᵀ X_t,                    float32 [N, K]

with the layer's inputs X_t and the gradients G_t = ∂L/∂Y_t of its outputs; rows are the tokens of both branches of
guidance, whose factors the gradients hold already. GPTQ has one Hessian for all outputs of a layer, so their errors are
taken as independent of each other:

    C = E_{sample, u} [ Mᵀ M ]                        the coherent form
    R = E_{sample, u} [ Σ_t Σ_rows ||g||² x xᵀ ]      the row form: C if the g of different rows were orthogonal

**Samples count alike.** A few samples are so sensitive that they would have most of the sum, though their real errors
saturate: at worst they become other pictures. Each sample's C and R are divided by their trace first.

**Shrinkage.** H = (1 - λ) C + λ R. C is a mean over few samples and R has less variance, so λ is what minimizes the
expected squared error of H if R is taken as given (Ledoit and Wolf 2004; Schäfer and Strimmer 2005): the variance of C
over its squared distance from R,

    λ = min(1, Σ_s ||C_s - C||² / (S (S - 1)) / ||C - R||²),

1 for a single sample and 0 for very many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.calibration.fisher import LayerGradients, backward_step
from adatsq_trt.calibration.units import Measured, parts
from adatsq_trt.execution import Executor, Shared
from adatsq_trt.solver import State


@dataclass
class GradientSums:
    """A layer's sums over samples.

    Attributes:
        coherent: of C_s, float32 [K, K].
        row: of R_s, float32 [K, K].
        squares: of ||C_s||², float64 [].
        count: samples, int64 [].
    """

    coherent: Tensor
    row: Tensor
    squares: Tensor
    count: Tensor

    def add(self, other: GradientSums) -> None:
        """Add the sums over other samples."""
        self.coherent += other.coherent
        self.row += other.row
        self.squares += other.squares
        self.count += other.count

    @property
    def shrinkage(self) -> float:
        """λ."""
        count = int(self.count)
        coherent, row = self.coherent.double() / count, self.row.double() / count
        spread = (self.squares / count - coherent.square().sum()).clamp(min=0)  # mean of ||C_s - C||²
        distance = float((coherent - row).square().sum())
        if count == 1 or not distance:
            return 1.0
        return min(1.0, float(spread) / (count - 1) / distance)

    def hessian(self) -> Tensor:
        """H, float32 [K, K]; of trace 1, or 0 where no sample has a gradient."""
        share = self.shrinkage
        return (self.coherent * (1 - share) + self.row * share) / int(self.count)


class SampleGradients:
    """Sums for one layer and one sample, accumulated while the steps go by.

    Attributes:
        gradients: M of each projection, float32 [projections, N, K]; None where the coherent form is not wanted.
        row: R_s before it is divided by its trace, float32 [K, K].
    """

    def __init__(self, projections: int, outputs: int, inputs: int, like: Tensor, coherent: bool) -> None:
        """Nothing added yet.

        Args:
            projections: how many there are.
            outputs: N of the layer.
            inputs: its K.
            like: a tensor of their device and type.
            coherent: whether the coherent form is wanted.
        """
        self.gradients = like.new_zeros(projections, outputs, inputs) if coherent else None
        self.row = like.new_zeros(inputs, inputs)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a step: float32 [rows, K] and [projections, rows, N]."""
        if self.gradients is not None:
            for sums, own in zip(self.gradients, gradients, strict=True):
                sums.addmm_(own.mT, inputs)
        weights = gradients.square().sum(dim=-1).mean(dim=0)
        self.row.addmm_((inputs * weights[:, None]).mT, inputs)

    def sums(self) -> GradientSums:
        """The sample alone, as a sum; without coherent gradients its R as it is."""
        row, count = self.row, torch.ones((), dtype=torch.int64, device=self.row.device)
        if self.gradients is None:
            return GradientSums(torch.zeros_like(row), row, row.new_zeros((), dtype=torch.float64), count)
        coherent = torch.zeros_like(row)
        for own in self.gradients:
            coherent.addmm_(own.mT, own)
        for form in (coherent, row):
            form /= form.diagonal().sum().clamp(min=torch.finfo(form.dtype).tiny)
        return GradientSums(coherent, row, coherent.double().square().sum(), count)


@dataclass(frozen=True)
class GradientUnit:
    """A whole sweep over the steps for a part of the batch.

    Attributes:
        samples: slice of the batch.
        latents: their full-precision trajectory, float32 [steps + 1, some samples, *latent_shape].
        start: u, float32 [projections, some samples, *latent_shape].
        layers: those whose sums are wanted.
        at_once: samples whose gradients are kept at a time; for the next ones the sweep begins again.
    """

    samples: slice
    latents: Tensor
    start: Tensor
    layers: tuple[str, ...]
    at_once: int


def gradient_sums(
    executor: Executor,
    common: Shared[Measured[bool]],
    latents: Tensor,
    start: Tensor,
    layers: Sequence[str],
    at_once: int,
    first: int = 0,
) -> Iterator[dict[str, GradientSums]]:
    """Sums over a part of the batch each, in the order of the parts, so that totals are the same wherever it is.

    Args:
        executor: who computes; a unit is the sweep of one part over all steps, since its gradients add up over them.
        common: the batch; whether the coherent form is wanted, which takes the most memory.
        latents: full-precision trajectory, float32 [steps + 1, samples, *latent_shape].
        start: u, float32 [projections, samples, *latent_shape].
        layers: module paths.
        at_once: samples of a part whose gradients are kept at a time. Decides no result.
        first: part to begin with.
    """
    units = (
        GradientUnit(part, latents[:, part].clone(), start[:, part].clone(), tuple(layers), at_once)
        for part in parts(latents.shape[1])[first:]
    )
    return executor.map(_part_sums, common, units)


def _part_sums(common: Measured[bool], unit: GradientUnit) -> dict[str, GradientSums]:
    totals: dict[str, GradientSums] = {}
    for begin in range(0, unit.latents.shape[1], unit.at_once):
        kept = sweep(common, unit, begin)
        for name in unit.layers:
            samples = kept.pop(name)
            for sample in samples:
                own = sample.sums()
                if name in totals:
                    totals[name].add(own)
                else:
                    totals[name] = own
    return totals


def sweep(common: Measured[bool], unit: GradientUnit, begin: int) -> dict[str, list[SampleGradients]]:
    """Go backwards over all steps.

    Args:
        common: the batch; whether the coherent form is wanted.
        unit: says of which samples and layers gradients are kept.
        begin: the first of these samples.

    Returns:
        Module path → what is kept of `unit.at_once` samples, or as many as are left.
    """
    samples, adjoint = common.samples.part(unit.samples), State(unit.start)
    kept: dict[str, list[SampleGradients]] = {}
    visit = keeping(common.extra, unit, begin, kept)
    for step in reversed(range(samples.schedule.steps)):
        adjoint = backward_step(samples, unit.latents[step], adjoint, step, visit, common.by_block)
    return kept


def keeping(
    coherent: bool, unit: GradientUnit, begin: int, kept: dict[str, list[SampleGradients]]
) -> Callable[[LayerGradients], None]:
    """Make what adds up the gradients of a step.

    Args:
        coherent: whether the coherent form is wanted.
        unit: says of which samples and layers gradients are kept.
        begin: the first of these samples.
        kept: module path → sums of each sample; receives them.
    """
    wanted, chosen = frozenset(unit.layers), slice(begin, begin + unit.at_once)

    def visit(layers: LayerGradients) -> None:
        for name in wanted & layers.inputs.keys():
            inputs, gradients = layers.inputs[name][chosen].float(), layers.gradients[name][:, chosen].float()
            sizes = len(gradients), gradients.shape[-1], inputs.shape[-1]
            if name not in kept:
                kept[name] = [SampleGradients(*sizes, inputs, coherent) for _ in inputs]
            for index, sample in enumerate(kept[name]):
                sample.add(inputs[index], gradients[:, index])

    return visit


def sample_bytes(shape: tuple[int, int], projections: int, coherent: bool) -> int:
    """Bytes that are kept of a layer and a sample while the steps go by.

    Args:
        shape: (K, N) of the layer.
        projections: how many there are.
        coherent: whether its coherent form is wanted.
    """
    inputs, outputs = shape
    return 4 * (inputs**2 + (projections * inputs * outputs if coherent else 0))


def sums_bytes(widths: Sequence[int]) -> int:
    """Bytes of some layers' sums, those of a part and of the parts before, and of the one that is being added.

    Args:
        widths: in_features of the layers.
    """
    squares = [4 * width**2 for width in widths]
    return 4 * sum(squares) + 4 * max(squares)

"""What two correct computations of one quantized graph may differ by, derived from the formats.

Whole graphs and layers of the `cpu` variant against PyTorch. Both sides round the same float32 values to the same
grids, but sum in another order, so a value that lies within float32 noise (about 1e-6 of its size) of a tie may round
to the other neighbour. Two figures follow:

- The *median* error over the elements. A coarse grid has few values near a tie, so a row that nothing has touched shows
  float32's own error, below 1e-6. But attention hands a flip in any token on to all tokens of its sample, in small
  parts: in the deeper layers of a text stream up to 2.7e-4 was measured (nvfp4, one text token), on a 16-bit grid,
  where every row sees flips of one unit of 2^-8, up to 2^-11. The limit is 2^-10 for both, and 1e-5 where nothing is
  rounded. A wrong scale, weight or bias moves nearly all elements, mostly by more than 2^-10.
- The *relative* error over the batch, which sees a defect that hits only some rows. The rows that flip differ by no
  more than one step of the coarsest grid in use, relative to the largest magnitude on it (integers: 1 / qmax) or to
  the value itself (2^-mantissa bits - 1). That step is the limit.

Blocks and layers of the `target` variant against the `cpu` variant. Both get the same inputs, but the target block
rounds to 16 bit after every operator. Two effects add up, with u the root mean square of a 16-bit rounding (2^-9 for
bfloat16, 2^-12 for float16) and s the coarsest grid's step:

- some 2^6 roundings that behave like a random walk: 2^3 u;
- rounding flips: a value that is off by u crosses a tie with probability 2 u / d and then moves by d, the distance to
  its neighbour, which has the root mean square sqrt(2 u d). On a floating grid d is up to 2 s.

Four quantized layers stand one behind the other in a block, which doubles the second effect, and magnitudes are uneven,
for which another factor of 2 is allowed: the limit of the relative error is 2^3 u + 4 sqrt(4 u s). An output sums many
inputs that flipped, so its error is about normal, and the median of a normal error is 0.67 times its root mean square:
so is the limit of the median. `make demo` (nvfp4 in bfloat16) showed up to 0.138, limit 0.192, and for the median
0.083, limit 0.130. A float32 target rounds like the cpu graph, so that its limits hold.

The loop. Each step may change the latent by its own tolerance r[k] relative to what the step does, dx[k] = x[k+1] -
x[k]; guidance g combines two predictions with the weights g and 1 - g. Flips of different steps are independent, so
their squares add. To first order, without what the model makes of an earlier step's difference, the latent x[t] may be
off by (|g| + |1 - g|) sqrt(sum over k < t of (r[k] |dx[k]|)^2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adatsq_trt.formats import FORMATS, Element, Grid

FLOAT32_MEDIAN = 1e-5
ROUNDED_MEDIAN = 2.0**-10
NORMAL_MEDIAN = 0.6745  # of |x| for x with the standard normal distribution
_TYPICAL_ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
_BLOCK_ROUNDINGS = 64


@dataclass(frozen=True)
class Tolerance:
    """What two correct computations may differ by.

    Attributes:
        median: median over the elements of |got - expected|, in units of the expected output's root mean square; None
            where the median says nothing.
        relative: |got - expected| / |got|, Euclidean norms over the whole batch.
    """

    median: float | None
    relative: float


def graph_tolerance(formats: Sequence[str]) -> Tolerance:
    """Limits for a cpu graph, and each layer in it, against PyTorch; see the head of this file.

    Args:
        formats: an assignment's format names.
    """
    step = coarsest_step(formats)
    if not step:
        return Tolerance(FLOAT32_MEDIAN, FLOAT32_MEDIAN)
    return Tolerance(ROUNDED_MEDIAN, step)


def block_tolerance(formats: Sequence[str], base_type: str) -> Tolerance:
    """Limits for a target block, and each layer in it, against the cpu block; see the head of this file.

    Args:
        formats: an assignment's format names.
        base_type: type of what is not quantized in the target graph.
    """
    if base_type == "float32":
        return graph_tolerance(formats)
    unit = _TYPICAL_ROUNDING[base_type]
    relative = unit * _BLOCK_ROUNDINGS**0.5 + 4 * (4 * unit * coarsest_step(formats)) ** 0.5
    return Tolerance(NORMAL_MEDIAN * relative, relative)


def loop_tolerances(latents: np.ndarray, steps: Sequence[Tolerance], guidance: float) -> list[Tolerance]:
    """Limits for the latent after every step of the loop; see the head of this file.

    Args:
        latents: [steps + 1, ...], the reference's.
        steps: every step's own tolerance.
        guidance: scale of classifier-free guidance; 1 when there is one branch.
    """
    moved = np.array([np.linalg.norm(after - before) for before, after in pairwise(latents)])
    allowed = np.sqrt(np.cumsum((np.array([own.relative for own in steps]) * moved) ** 2))
    size = np.array([np.linalg.norm(latent) for latent in latents[1:]])
    relative = np.divide(allowed, size, out=np.zeros_like(allowed), where=size > 0)
    factor = abs(guidance) + abs(1 - guidance)
    return [Tolerance(None, max(factor * limit, FLOAT32_MEDIAN)) for limit in relative.tolist()]


def coarsest_step(formats: Iterable[str]) -> float:
    """Largest step of the activation grids in use; 0 when nothing is rounded."""
    return max(_step(FORMATS[name].activation) for name in formats)


def _step(grid: Grid) -> float:
    if grid.element is Element.INT:
        return 1 / grid.maximum
    relative = {Element.FP32: 0.0, Element.FP16: 2.0**-11, Element.BF16: 2.0**-8, Element.E4M3: 2.0**-4}
    return relative.get(grid.element, 2.0**-2)

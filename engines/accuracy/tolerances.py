"""Limits on the difference between two correct computations of one quantized graph, derived from the formats.

Both sides round the same numbers to the same grids, but sum in another order. A value that lies within float32 noise of
a tie so rounds to the other neighbour: a flip. Attention hands a flip on to all tokens of its sample, where it makes
more values cross their ties; behind a few blocks two correct computations of a whole graph differ by nearly as much as
quantization itself costs. So layers are compared each by itself, whole graphs and loops by how far flips spread.

Layers of the `cpu` variant against PyTorch. Each is given PyTorch's outputs of the layers before it, so that what is
left is float32's own error, below 1e-6, and the flips of the layer's own input. Let s be the step of its activation
grid, relative to the largest magnitude on it (integers: 1 / qmax) or to the value itself (2^-mantissa bits - 1), and
v = 2^-20 the difference of float32 sums, relative to a token's root mean square:

- An input flips with the probability p = 8 v / s: two sides of a tie, and a factor of 4 since a floating grid has more
  ties near zero. Tokens that are equal flip together, so few of them are compared
  (`separate_layers`). Of E = tokens * K inputs up to n = E p + 4 sqrt(E p) + 4 flip.
- A flip moves one of the K products of a sum by s of it. Magnitudes reach eight times their root mean square, so the
  relative error is at most 8 s sqrt(n / E), and never more than s. A block scale of e2m1 that flips moves 16 values by
  half of that step, for which n counts four times.
- The *median* error over the elements sees no flip while most sums hold none, K p < 1/2: then its limit is 1e-5, else
  s sqrt(p), what evenly spread flips amount to. A wrong scale, weight or bias moves nearly all elements.

Whole graphs and the loop against PyTorch. How far flips spread is a property of the model. The exporter measures it: it
runs the fake-quantized PyTorch model again, with noise of 2^-16 at every layer's input, twelve times. That is 16 v, so
that flips are sure to happen, and where they have once spread, more of them change little. Where few layers round their
inputs, one flip may be most of the error: a graph of 16-bit and 4-bit inputs showed 8.8e-5 with it and 3.0e-5 without,
and 22 of 48 draws had it, so four were too few to count on it. The limit is twice the largest relative error among the
twelve; for a graph's output never more than the assignment's coarsest step.

Blocks and layers of the `target` variant against the `cpu` variant. Both get the same inputs, but the target block
rounds to 16 bit after every operator. Two effects add up, with u the root mean square of a 16-bit rounding (2^-9 for
bfloat16, 2^-12 for float16) and s the coarsest grid's step:

- some 2^6 roundings that behave like a random walk: 2^3 u;
- rounding flips: a value that is off by u crosses a tie with probability 2 u / d and then moves by d, the distance to
  its neighbour, which has the root mean square sqrt(2 u d). On a floating grid d is up to 2 s.

Modules outside of the blocks hold no quantized layer: their limit is the first effect's, and 0.67 times it for the
median.

Every quantized layer on the way to a value adds the second effect once more. The effects are independent, so R of them
multiply it by sqrt(R). Magnitudes are uneven, for which another factor of 2 is allowed: the limit of the relative error
is 2^3 u + 2 sqrt(4 R u s). R is read from the graph (`rounded_layers`):

- a layer has one more than its input. Four stand one behind the other in a block of Flux, six in one of Wan, which has
  two attentions. Values with fewer have the limit of four, since attention multiplies rounded values, too;
- a gated feed-forward network multiplies the outputs of two layers. A product has the relative errors of both factors,
  so its R is the sum. In Z-Image both factors have three, and the layer behind their product has seven.

Plans on a GPU against the `cpu` graph. A plan is the target graph as a whole: what one block may add, B blocks add
independently, so the limit of its output is sqrt(B) times a block's. Its loop is compared with the loop of the
fake-quantized PyTorch model: a step moves the latent by |x[t+1] - x[t]|, of which at most the output's limit is wrong,
times sqrt(g^2 + (g - 1)^2) where guidance of scale g combines two rows, with 1 more below the root where it also takes
the norm of one of them; independent steps add in squares, twice that is allowed for what an error does to later steps,
and flips spread as in the loop of the `cpu` graphs. These limits grow with depth: they find a plan that computes
something else, not a layer that is a few percent off, which the rows of the `target` graph find. Blocks of plans have a
block's limits: each is compared with the `cpu` block on the plan's own inputs.

An output sums many inputs that flipped, so its error is about normal, and the median of a normal error is 0.67 times
its root mean square: so is the limit of the median. `make demo` (nvfp4 in bfloat16, R = 4) showed up to 0.138, limit
0.192, and for the median 0.083, limit 0.130. A float32 target block differs from its twin by flips only; its limits are
one step s for the relative error and 2^-10 for the median.

Nearest to the limits: an untrained Z-Image of width 192 with all layers in nvfp4 shows 0.183 behind the gate of its
context refiner, limit 0.249, and for the median 0.119, limit 0.168.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adatsq_trt.formats import Element, Grid, format_named

FLOAT32_ERROR = 1e-5
NORMAL_MEDIAN = 0.6745  # of |x| for x with the standard normal distribution
_FLOAT32_NOISE = 2.0**-20
_UNEVEN_TIES, _UNEVEN_MAGNITUDES = 4, 8
_BLOCK_FLIP = 4  # what a flip of e2m1's block scale counts
_SPREAD_MARGIN = 2
_FLOAT32_BLOCK_MEDIAN = 2.0**-10
_TYPICAL_ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
_BLOCK_ROUNDINGS = 64
_FEWEST_LAYERS = 4  # of a transformer block


@dataclass(frozen=True)
class Tolerance:
    """Limits on the difference between two correct computations.

    Attributes:
        median: median over the elements of |got - expected|, in units of the expected output's root mean square; None
            where the median says nothing.
        relative: |got - expected| / |got|, Euclidean norms over the whole batch.
    """

    median: float | None
    relative: float


FLOAT32 = Tolerance(FLOAT32_ERROR, FLOAT32_ERROR)


def layer_tolerance(grid: Grid, tokens: int, in_features: int) -> Tolerance:
    """Limits for a layer of a cpu graph that is given PyTorch's outputs of the layers before it; see the file's head.

    Args:
        grid: of the layer's activations.
        tokens: rows that are compared.
        in_features: K.
    """
    step = _step(grid)
    if not step:
        return FLOAT32
    probability = 2 * _FLOAT32_NOISE * _UNEVEN_TIES / step
    inputs = max(tokens * in_features, 1)
    expected = inputs * probability
    flips = expected + 4 * expected**0.5 + 4
    if grid.element is Element.E2M1:
        flips *= _BLOCK_FLIP
    relative = min(step, _UNEVEN_MAGNITUDES * step * (flips / inputs) ** 0.5)
    median = FLOAT32_ERROR if in_features * probability < 0.5 else step * probability**0.5
    return Tolerance(median, relative)


def output_tolerance(formats: Sequence[str], spread: float) -> Tolerance:
    """Limits for the output of a whole cpu graph against PyTorch; see the head of this file.

    Args:
        formats: an assignment's format names.
        spread: relative error that the exporter measured under noise.
    """
    step = coarsest_step(formats)
    if not step:
        return FLOAT32
    return Tolerance(None, min(max(_SPREAD_MARGIN * spread, FLOAT32_ERROR), step))


def loop_tolerances(formats: Iterable[str], spread: Sequence[float]) -> list[Tolerance]:
    """Limits for the latent after every step of the loop; see the head of this file.

    Args:
        formats: names of all formats in use.
        spread: relative error of every latent that the exporter measured under noise.
    """
    margin = _SPREAD_MARGIN if coarsest_step(formats) else 0
    return [Tolerance(None, max(margin * error, FLOAT32_ERROR)) for error in spread]


def block_tolerance(formats: Sequence[str], base_type: str, layers: int = 0) -> Tolerance:
    """Limits for a value of a target block against that of the cpu block; see the head of this file.

    Args:
        formats: an assignment's format names.
        base_type: type of what is not quantized in the target graph.
        layers: R, how often a quantized layer's error counts in the value.
    """
    step = coarsest_step(formats)
    if base_type == "float32":
        return Tolerance(_FLOAT32_BLOCK_MEDIAN, step) if step else FLOAT32
    unit = _TYPICAL_ROUNDING[base_type]
    relative = unit * _BLOCK_ROUNDINGS**0.5 + 2 * (4 * max(layers, _FEWEST_LAYERS) * unit * step) ** 0.5
    return Tolerance(NORMAL_MEDIAN * relative, relative)


def plan_tolerance(formats: Sequence[str], base_type: str, blocks: int) -> Tolerance:
    """Limits for a plan's output against the `cpu` graph; see the head of this file.

    Args:
        formats: an assignment's format names.
        base_type: type of what is not quantized in the target graph.
        blocks: of the model, one behind the other.
    """
    block = block_tolerance(formats, base_type)
    return Tolerance(None, block.relative * max(blocks, 1) ** 0.5)


def plan_loop_tolerances(
    outputs: Sequence[float],
    moves: Sequence[float],
    sizes: Sequence[float],
    guidance: float,
    cpu: Sequence[Tolerance],
    rescaled: bool = False,
) -> list[Tolerance]:
    """Limits for the latent after every step of the plans' loop; see the head of this file.

    Args:
        outputs: relative limit of every step's output.
        moves: Euclidean norm of what every step adds to the latent.
        sizes: of the latent after it.
        guidance: its scale; 1 where rows are not combined.
        cpu: limits of the `cpu` graphs' loop.
        rescaled: guidance also takes the norm of the conditional row.
    """
    combined = (guidance**2 + (guidance - 1) ** 2 + rescaled) ** 0.5
    limits, squares = [], 0.0
    for output, move, size, own in zip(outputs, moves, sizes, cpu, strict=True):
        squares += (combined * output * move) ** 2
        limits.append(Tolerance(None, _SPREAD_MARGIN * squares**0.5 / size + own.relative))
    return limits


def unquantized_tolerance(base_type: str) -> Tolerance:
    """Limits for a value of a target graph that no layer is quantized in front of: 16-bit roundings alone.

    Args:
        base_type: type of the target graph.
    """
    if base_type == "float32":
        return FLOAT32
    relative = _TYPICAL_ROUNDING[base_type] * _BLOCK_ROUNDINGS**0.5
    return Tolerance(NORMAL_MEDIAN * relative, relative)


def coarsest_step(formats: Iterable[str]) -> float:
    """Largest step of the activation grids in use; 0 when nothing is rounded."""
    return max(_step(format_named(name).activation) for name in formats)


def _step(grid: Grid) -> float:
    if grid.element is Element.INT:
        return 1 / grid.maximum
    relative = {Element.FP32: 0.0, Element.FP16: 2.0**-11, Element.BF16: 2.0**-8, Element.E4M3: 2.0**-4}
    return (relative | {Element.E2M1: 2.0**-2})[grid.element]

"""Smoothing: move the size of an input channel into the weight (Xiao et al. 2023, "SmoothQuant", eq. 4).

Channel j is divided by s_j = max|X_j|^α / max|W_j|^(1 - α).
"""

from __future__ import annotations

from torch import Tensor

from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.statistics import SMALLEST, LayerGroup
from adatsq_trt.transforms import InputMap

STRENGTH = 0.5  # α of the paper


def divisor(largest_input: Tensor, largest_weight: Tensor, strength: float = STRENGTH) -> Tensor:
    """Divisor of every channel, float32 [K], with a geometric mean of one, so that magnitudes stay where they were.

    Args:
        largest_input: max|X_j|, float32 [K].
        largest_weight: max|W_j|, float32 [K].
        strength: α between 0 (all to the input) and 1 (all to the weight).
    """
    scale = largest_input.clamp(min=SMALLEST) ** strength / largest_weight.clamp(min=SMALLEST) ** (1 - strength)
    normalized: Tensor = scale / scale.log().mean().exp()
    return normalized


def smooth(group: LayerGroup, form: GraphForm | None = None) -> InputMap:
    """SmoothQuant's scales, from the largest input over all steps."""
    scale = divisor(group.largest.amax(dim=0), group.largest_weight)
    return InputMap(divisor=scale if form is None else form.rounded(scale))

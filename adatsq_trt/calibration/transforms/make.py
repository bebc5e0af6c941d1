"""The interface of all transforms: a name and the measured layers give every layer's transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adatsq_trt.calibration.transforms.balance import balance
from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.hadamard import rotate
from adatsq_trt.calibration.transforms.low_rank import branch
from adatsq_trt.calibration.transforms.smooth import smooth
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.transforms import InputMap, LayerTransform


@dataclass(frozen=True)
class Transform:
    """How transforms of one kind are made.

    Attributes:
        input_map: from a group, and what graphs hold, to the map of its input.
        divides: whether that divides channels.
        rotates: whether it turns the input.
        low_rank: whether the mapped weight gets a branch.
    """

    input_map: Callable[[LayerGroup, GraphForm | None], InputMap]
    divides: bool = False
    rotates: bool = False
    low_rank: bool = False


TRANSFORMS: Mapping[str, Transform] = {
    "smooth": Transform(smooth, divides=True),
    "hadamard": Transform(rotate, rotates=True),
    "balance": Transform(balance, divides=True, rotates=True),
    "low-rank": Transform(smooth, divides=True, low_rank=True),
    "hadamard-low-rank": Transform(rotate, rotates=True, low_rank=True),
    "balance-low-rank": Transform(balance, divides=True, rotates=True, low_rank=True),
}


def make_transforms(
    name: str, groups: Sequence[LayerGroup], form: GraphForm | None = None
) -> dict[str, LayerTransform]:
    """Module path → transform.

    Args:
        name: one of `TRANSFORMS`.
        groups: all quantizable layers.
        form: what graphs hold; None for a simulated run.
    """
    transform, result = TRANSFORMS[name], {}
    dtype = torch.bfloat16 if form is None else form.dtype
    for group in groups:
        input_map = transform.input_map(group, form)
        for layer, weight in group.weights.items():
            low_rank = branch(input_map.weight(weight), dtype) if transform.low_rank else None
            result[layer] = LayerTransform(input_map, low_rank)
    return result

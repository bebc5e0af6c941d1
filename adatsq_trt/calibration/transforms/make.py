"""The interface of all transforms: a name and the measured layers give every layer's transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adatsq_trt.calibration.transforms.balance import balance
from adatsq_trt.calibration.transforms.hadamard import rotate
from adatsq_trt.calibration.transforms.low_rank import branch
from adatsq_trt.calibration.transforms.smooth import smooth
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.models.transforms import InputMap, LayerTransform


@dataclass(frozen=True)
class Transform:
    """How transforms of one kind are made.

    Attributes:
        input_map: from a group to the map of its input.
        low_rank: whether the mapped weight gets a branch.
    """

    input_map: Callable[[LayerGroup], InputMap]
    low_rank: bool = False


TRANSFORMS: Mapping[str, Transform] = {
    "smooth": Transform(smooth),
    "hadamard": Transform(rotate),
    "balance": Transform(balance),
    "low-rank": Transform(smooth, low_rank=True),
    "hadamard-low-rank": Transform(rotate, low_rank=True),
    "balance-low-rank": Transform(balance, low_rank=True),
}


def make_transforms(name: str, groups: Sequence[LayerGroup]) -> dict[str, LayerTransform]:
    """Module path → transform.

    Args:
        name: one of `TRANSFORMS`.
        groups: all quantizable layers.
    """
    transform, result = TRANSFORMS[name], {}
    for group in groups:
        input_map = transform.input_map(group)
        for layer, weight in group.weights.items():
            low_rank = branch(input_map.weight(weight)) if transform.low_rank else None
            result[layer] = LayerTransform(input_map, low_rank)
    return result

"""Rotation: spread outliers over all channels (Ashkboos et al. 2024, "QuaRot", section 4).

R is a randomized Hadamard matrix, R = diag(±1) H. In a simulated run every input is rotated when it arrives; folding R
into the layer before, where there is one without a nonlinearity between, gives the same numbers for less work. In a
graph blocks of channels are rotated, each by itself: a product with a matrix as wide as the layer would cost as much as
the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.transforms import InputMap


def random_signs(width: int) -> Tensor:
    """Signs of the rows, float32 [width]; the same for one width always."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1


def rotate(group: LayerGroup, form: GraphForm | None = None) -> InputMap:
    """QuaRot's rotation of the group's input, of blocks where it is for graphs."""
    return with_rotation(None, group, form)


def with_rotation(divisor: Tensor | None, group: LayerGroup, form: GraphForm | None) -> InputMap:
    """The rotation, behind a division of the channels."""
    block = None if form is None else form.block_of(group.width)
    signs = random_signs(group.width if block is None else block)
    return InputMap(divisor, signs.to(group.largest.device), block)

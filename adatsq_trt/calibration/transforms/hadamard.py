"""Rotation: spread outliers over all channels (Ashkboos et al. 2024, "QuaRot", section 4).

R is a randomized Hadamard matrix, R = diag(±1) H. In a simulated run every input is rotated when it arrives; folding R
into the layer before, where there is one without a nonlinearity between, gives the same numbers for less work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.models.transforms import InputMap


def random_signs(width: int) -> Tensor:
    """Signs of the rows, float32 [width]; the same for one width always."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1


def rotate(group: LayerGroup) -> InputMap:
    """QuaRot's rotation of the group's input."""
    return InputMap(signs=random_signs(group.width).to(group.largest.device))

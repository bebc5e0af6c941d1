"""A branch of low rank in 16 bits takes what is hard to round (Li et al. 2025, "SVDQuant", section 4).

Smoothing moves the outliers of the input into the weight; the largest singular values of the smoothed weight stay in 16
bits, and only the rest is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adatsq_trt.models.transforms import Branch

# The paper's rank 32 belongs to layers 3,072 wide: one rank for 96 channels of the narrower side, rounded up.
CHANNELS_PER_RANK = 96


def rank_of(weight: Tensor) -> int:
    """The branch's rank for a weight [N, K]: the same share of it as 32 is of Flux's 3,072."""
    return -(-min(weight.shape) // CHANNELS_PER_RANK)


def branch(weight: Tensor) -> Branch:
    """The best approximation of a weight with its rank, in bfloat16 (Eckart and Young 1936).

    Args:
        weight: W̃, float32 [N, K].
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = rank_of(weight)
    root = s[:rank].sqrt()
    return Branch((root[:, None] * vh[:rank]).bfloat16().float(), (u[:, :rank] * root).bfloat16().float())

"""A branch of low rank in 16 bits takes what is hard to round (Li et al. 2025, "SVDQuant", section 4).

Smoothing moves the outliers of the input into the weight; the largest singular values of the smoothed weight stay in 16
bits, and only the rest is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adatsq_trt.transforms import Branch

# The paper's rank 32 belongs to layers 3,072 wide: one rank for 96 channels of the narrower side, rounded up.
CHANNELS_PER_RANK = 96


def rank_of(width: int, outputs: int) -> int:
    """The branch's rank for a weight [outputs, width]: the same share of it as 32 is of Flux's 3,072."""
    return -(-min(width, outputs) // CHANNELS_PER_RANK)


def branch(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Branch:
    """The best approximation of a weight with its rank, in 16 bits (Eckart and Young 1936).

    Args:
        weight: W̃, float32 [N, K].
        dtype: of the factors; they are bfloat16's numbers too.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    outputs, width = weight.shape
    rank = rank_of(width, outputs)
    root = s[:rank].sqrt()
    down, up = (factor.bfloat16().to(dtype).float() for factor in (root[:, None] * vh[:rank], u[:, :rank] * root))
    return Branch(down, up)

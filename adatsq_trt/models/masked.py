"""Conditions of several lengths in one batch: zeros follow a prompt's own tokens, and attention does not see them."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to a product of a query and a key; its exponential is 0 in every type, and in fp16 it is a number.
_UNSEEN = -3e4


def count_tokens(condition: Tensor, places: Tensor) -> Tensor:
    """Tokens of each prompt, but for the zeros that follow them: float32 [B].

    Args:
        condition: [B, T, D].
        places: 1 to T, float32.
    """
    there = condition.abs().amax(-1) > 0
    return torch.where(there, places, torch.zeros_like(places)).amax(1)


def attention_mask(lengths: Tensor, places: Tensor) -> Tensor:
    """Make the mask that is added to the products with the keys of a text: [B, T], about -inf beyond each length.

    Args:
        lengths: tokens of each row that are seen, float32 [B].
        places: 1 to T, float32.
    """
    return torch.where(places <= lengths[:, None], 0.0, _UNSEEN)

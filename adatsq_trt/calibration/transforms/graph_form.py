"""Form in which a graph in 16 bits holds a transform without another rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adatsq_trt.formats import NVFP4_BLOCK, Element, Format

BLOCKS = (128, 64, 16)  # that rotations turn, the largest first
_LARGEST_EXPONENT = 8  # of divisors: what they scale stays well within float16


@dataclass(frozen=True)
class GraphForm:
    """Numbers and widths of transforms that graphs hold.

    Attributes:
        dtype: of the matrices of branches: what is not quantized has it.
        blocks: widths that a rotation may turn, the largest first.
    """

    dtype: torch.dtype
    blocks: tuple[int, ...] = BLOCKS

    def block_of(self, width: int) -> int:
        """The widest block that divides a width. There is one, which is asked before anything runs."""
        return next(block for block in self.blocks if width % block == 0)

    def rounded(self, divisor: Tensor) -> Tensor:
        """Divisors as the nearest powers of two: dividing by them is exact, before and after any rounding."""
        return torch.exp2(divisor.log2().round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


def rotated_blocks(formats: Iterable[Format]) -> tuple[int, ...]:
    """Widths that a rotation may turn: formats with a scale for each small block want it to stay within the block."""
    blocked = any(fmt.activation.element is Element.E2M1 for fmt in formats)
    return (NVFP4_BLOCK,) if blocked else BLOCKS

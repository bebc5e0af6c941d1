"""Transforms of a layer's input and weight before they are rounded, so that less is lost.

A layer y = x Wᵀ becomes

    x̃ = (x / s) R,      W̃ = (W s) R⁻ᵀ,      y = x̃ W̃ᵀ = Q(x̃) Q(W̃ - B A)ᵀ + x̃ (B A)ᵀ     (before rounding),

with a divisor s for each input channel, a rotation R and a branch B A of low rank in 16 bits; each of the three may be
missing. `adatsq_trt.calibration.transforms` makes them. R is orthogonal, or in graphs a power of two times that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.errors import DamagedFileError, UserError
from adatsq_trt.files import read_tensors, write_tensors

BRANCH_BITS = 16


@dataclass(frozen=True, eq=False)
class InputMap:
    """x → (x / divisor) R, one object for all layers that are given the same tensor.

    Attributes:
        divisor: s, float32 [K], positive; None for ones.
        signs: R is the Hadamard matrix of width K with its rows multiplied by these, float32 [K]; None for R = 1.
        block: None, or R turns blocks of so many channels, all alike; then there are as many signs, and R is multiplied
            by a number that makes its entries powers of two, which every 16-bit type holds.
    """

    divisor: Tensor | None = None
    signs: Tensor | None = None
    block: int | None = None

    @cached_property
    def rotation(self) -> Tensor | None:
        """R, float32 [K, K], or of one block [block, block]."""
        if self.signs is None:
            return None
        width = len(self.signs)
        matrix = hadamard(width) if self.block is None else hadamard_signs(width) / _root(width)
        return self.signs[:, None] * matrix.to(self.signs.device)

    @cached_property
    def weight_rotation(self) -> Tensor | None:
        """Rotation R⁻ᵀ of a weight whose input R turns, in the shape of R."""
        if self.rotation is None or self.block is None:
            return self.rotation
        return self.rotation * (_root(self.block) ** 2 / self.block)

    def inputs(self, x: Tensor) -> Tensor:
        """x̃ of x; float32 [..., K]."""
        return self._turned(x if self.divisor is None else x / self.divisor, self.rotation)

    def weight(self, weight: Tensor) -> Tensor:
        """W̃ of W; float32 [N, K]."""
        return self._turned(weight if self.divisor is None else weight * self.divisor, self.weight_rotation)

    def second_moment(self, moment: Tensor) -> Tensor:
        """E[x̃ x̃ᵀ] of E[x xᵀ]; float32 [K, K]."""
        scaled = moment if self.divisor is None else moment / (self.divisor[:, None] * self.divisor)
        if self.block is not None:
            return self._turned(self._turned(scaled, self.rotation).mT, self.rotation).mT
        return scaled if self.rotation is None else self.rotation.mT @ scaled @ self.rotation

    def _turned(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """[..., K] times a rotation of all channels or of each block."""
        if rotation is None:
            return x
        return x @ rotation if self.block is None else (x.unflatten(-1, (-1, self.block)) @ rotation).flatten(-2)


@dataclass(frozen=True)
class Branch:
    """A part of the weight that stays in 16 bits: x̃ → x̃ downᵀ upᵀ.

    Attributes:
        down: A, float32 [rank, K], exact in 16 bits.
        up: B, float32 [N, rank], exact in 16 bits.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """How many products of a row and a column B A is the sum of."""
        return len(self.down)

    @property
    def weight(self) -> Tensor:
        """B A, float32 [N, K]."""
        return self.up @ self.down


@dataclass(frozen=True)
class LayerTransform:
    """The transform of one layer.

    Attributes:
        input_map: of its input.
        branch: part of the weight that stays in 16 bits, or None.
    """

    input_map: InputMap = InputMap()
    branch: Branch | None = None

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Compute the weight that is left to be rounded: W̃ - B A, float32 [N, K]."""
        mapped = self.input_map.weight(weight)
        return mapped if self.branch is None else mapped - self.branch.weight

    @property
    def bits(self) -> float:
        """Bits of the branch; divisors and signs are not counted, since they can be folded into what comes before."""
        return 0.0 if self.branch is None else BRANCH_BITS * (self.branch.down.numel() + self.branch.up.numel())


IDENTITY = LayerTransform()


@lru_cache(maxsize=16)
def hadamard(width: int) -> Tensor:
    """A Hadamard matrix divided by the root of its width, float32 [width, width]: orthogonal.

    Raises:
        UserError: `hadamard_signs` has no matrix of that width.
    """
    return hadamard_signs(width) / math.sqrt(width)


def hadamard_signs(width: int) -> Tensor:
    """A Hadamard matrix, float32 [width, width] of 1 and -1.

    Sylvester's doubling of the smallest of Paley's matrices (Paley 1933) that is there for the width: they have the
    width q + 1 for primes q = 3 mod 4. This covers the usual transformers (1152 = 2⁴ · 72, 3072 = 2⁸ · 12).

    Raises:
        UserError: this construction has no matrix of that width.
    """
    halves = [width >> i for i in range(width.bit_length()) if width % (1 << i) == 0]
    cores = [core for core in halves if core == 1 or _is_paley(core)]
    if not cores:
        raise UserError(f"no Hadamard matrix of width {width} is known here; choose a transform that does not rotate")
    core = min(cores)
    matrix = torch.ones(1, 1) if core == 1 else _paley(core)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _root(width: int) -> float:
    """The largest power of two that is no more than the root of a power of two."""
    return 2.0 ** ((width.bit_length() - 1) // 2)


def _is_paley(width: int) -> bool:
    prime = width - 1
    return width % 4 == 0 and all(prime % d for d in range(2, math.isqrt(prime) + 1))


def _paley(width: int) -> Tensor:
    """Paley's first construction: 1 + S with the skew matrix S of quadratic residues modulo width - 1."""
    prime = width - 1
    residues = {x * x % prime for x in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, prime)])
    indices = torch.arange(prime)
    skew = torch.ones(width, width)
    skew[0, 0] = 0
    skew[1:, 0] = -1
    skew[1:, 1:] = character[(indices[None] - indices[:, None]) % prime]
    return torch.eye(width) + skew


def save_transforms(path: Path, transforms: Mapping[str, LayerTransform]) -> None:
    """Write the transforms of all layers: `map.<i>.<part>`, `<layer>.map` and `<layer>.<part of the branch>`."""
    maps = list(dict.fromkeys(transform.input_map for transform in transforms.values()))
    tensors: dict[str, Tensor] = {}
    for index, input_map in enumerate(maps):
        parts = {"divisor": input_map.divisor, "signs": input_map.signs}
        if input_map.block is not None:
            parts["block"] = torch.tensor(input_map.block)
        tensors |= {f"map.{index}.{name}": part for name, part in parts.items() if part is not None}
    for layer, transform in transforms.items():
        tensors[f"{layer}.map"] = torch.tensor(maps.index(transform.input_map))
        if transform.branch is not None:
            tensors |= {f"{layer}.down": transform.branch.down, f"{layer}.up": transform.branch.up}
    write_tensors(path, tensors)


def load_transforms(path: Path) -> dict[str, LayerTransform]:
    """Read what `save_transforms` wrote.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: not a complete file.
    """
    tensors = read_tensors(path)
    maps: dict[int, InputMap] = {}
    transforms = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part != "map":
            continue
        index = int(tensor)
        if index not in maps:
            block = tensors.get(f"map.{index}.block")
            maps[index] = InputMap(
                tensors.get(f"map.{index}.divisor"),
                tensors.get(f"map.{index}.signs"),
                None if block is None else int(block),
            )
        branch = None
        if f"{layer}.down" in tensors:
            if f"{layer}.up" not in tensors:
                raise DamagedFileError(f"'{path}' has half a branch for layer '{layer}'; delete it and quantize again")
            branch = Branch(tensors[f"{layer}.down"], tensors[f"{layer}.up"])
        transforms[layer] = LayerTransform(maps[index], branch)
    return transforms

"""Costs of a policy, and budgets: whether a policy keeps them, and whether a prefix still can.

Bits and milliseconds add up over steps and layers. Bytes do not: a layer's weight in one format is stored once, however
many steps use it, so a policy costs, for every layer, the sum over the distinct weight formats that it has. With
weights once a layer has one of them for all steps, whatever the budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.costs import ROUNDING, Costs
from adatsq_trt.formats import Format
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.active import Active
from adatsq_trt.search.candidates import Array, Assignment

# Weights of two budgets that are tried.
_RATIOS = 65


@dataclass(frozen=True)
class Additive:
    """A budget for a cost that adds up.

    Attributes:
        unit: "bits", "ms" or "activation_bits".
        cost: of one step: [formats, layers].
        limit: of the whole policy.
    """

    unit: str
    cost: Array
    limit: float


@dataclass(frozen=True)
class Storage:
    """A budget for stored weights.

    Attributes:
        grids: [formats]: which formats share a weight grid, as an index.
        bytes: [grids, layers].
        limit: of the whole policy; infinite where nobody set one.
        once: whether a layer stores one grid, which all of its steps use.
        cells: [steps, layers]: which layers run at which step; None for all.
    """

    grids: NDArray[np.int64]
    bytes: Array
    limit: float = math.inf
    once: bool = False
    cells: Active | None = None

    @classmethod
    def of(
        cls,
        formats: Sequence[Format],
        shapes: Sequence[LayerShape],
        limit: float = math.inf,
        *,
        once: bool = False,
        cells: Active | None = None,
    ) -> Storage:
        """From shapes: `resident_weight_bytes` counts the same."""
        distinct = list(dict.fromkeys(fmt.weight for fmt in formats))
        grids = np.array([distinct.index(fmt.weight) for fmt in formats])
        one = [formats[int(np.flatnonzero(grids == g)[0])] for g in range(len(distinct))]
        sizes = [
            [f.stored_weight_bits(s.in_features) / 8 * s.in_features * s.out_features for s in shapes] for f in one
        ]
        return cls(grids, np.array(sizes), limit, once, cells)

    def used(self, rows: NDArray[np.int64]) -> float:
        """Bytes of a policy [steps, layers]."""
        total = 0.0
        for sizes, stored in zip(self.bytes, self.stored(rows), strict=True):
            total += float(sizes[stored].sum())
        return total

    def stored(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[grids, layers]: which grids of a layer a policy uses where the layer runs."""
        used = self.grids[rows] == np.arange(len(self.bytes))[:, None, None]
        stored: NDArray[np.bool_] = (used if self.cells is None else used & self.cells[: len(rows)]).any(axis=1)
        return stored

    def holds(self, rows: NDArray[np.int64]) -> bool:
        """Whether a policy [steps, layers] stores no more grids of a layer than it may."""
        return not self.once or bool((self.stored(rows).sum(axis=0) <= 1).all())


@dataclass(frozen=True)
class Budgets:
    """All budgets of a search.

    Attributes:
        steps: of the loop.
        additive: in bits, milliseconds and activation bits, as far as there are such limits.
        storage: in bytes, likewise.
        allowed: [formats, layers]: whether a layer may have a format; None where every one may.
        cells: [steps, layers]: which layers run at which step; None for all.
    """

    steps: int
    additive: tuple[Additive, ...]
    storage: Storage | None = None
    allowed: NDArray[np.bool_] | None = None
    cells: Active | None = None

    def active(self, layers: int) -> Active:
        """[steps, layers]: which of the layers run at which step."""
        return np.ones((self.steps, layers), dtype=bool) if self.cells is None else self.cells

    @property
    def once(self) -> bool:
        """Whether a layer stores one weight for all steps."""
        return self.storage is not None and self.storage.once

    def of_formats(self, formats: NDArray[np.int64]) -> Budgets:
        """The same where only some formats, by their indices, may be chosen."""
        additive = tuple(replace(item, cost=item.cost[formats]) for item in self.additive)
        allowed = None if self.allowed is None else self.allowed[formats]
        if self.storage is None:
            return Budgets(self.steps, additive, None, allowed, self.cells)
        stored, grids = np.unique(self.storage.grids[formats], return_inverse=True)
        storage = replace(self.storage, grids=grids, bytes=self.storage.bytes[stored])
        return Budgets(self.steps, additive, storage, allowed, self.cells)

    def spent(self, rows: Sequence[Assignment]) -> dict[str, float]:
        """Unit → what a policy, or the first steps of one, costs."""
        array = np.array(rows, dtype=np.int64)
        layers, active = np.arange(array.shape[1]), self.active(array.shape[1])[: len(array)]
        result = {item.unit: float((item.cost[array, layers] * active).sum()) for item in self.additive}
        if self.storage is not None:
            result["bytes"] = self.storage.used(array)
        return result

    def limits(self) -> dict[str, float]:
        """Unit → budget."""
        result = {item.unit: item.limit for item in self.additive}
        return result if self.storage is None else {**result, "bytes": self.storage.limit}

    def holds(self, rows: Sequence[Assignment]) -> bool:
        """Whether a policy keeps every budget, one weight of each layer where it may have no more, and its formats."""
        array = np.array(rows, dtype=np.int64)
        if self.storage is not None and not self.storage.holds(array):
            return False
        if self.allowed is not None:
            idle = ~self.active(array.shape[1])[: len(array)]
            if not (self.allowed[array, np.arange(array.shape[1])] | idle).all():
                return False
        limits = self.limits()
        return all(cost <= limits[unit] * (1 + ROUNDING) for unit, cost in self.spent(rows).items())

    def fits(self, prefix: Sequence[Assignment], rests: Sequence[Sequence[Assignment]]) -> bool:
        """Whether one of several known rests of the trajectory completes a prefix within every budget.

        Args:
            prefix: assignments of the first steps.
            rests: whole policies; the prefix is completed with their last steps.
        """
        return any(self.holds([*prefix, *rest[len(prefix) :]]) for rest in rests)

    def cheapest(self, unit: str) -> float:
        """The least that any policy costs in one unit."""
        if unit == "bytes":
            assert self.storage is not None
            cost = self.storage.bytes[self.storage.grids]
        else:
            cost = next(item.cost for item in self.additive if item.unit == unit)
            cost = cost * self.active(cost.shape[1]).sum(axis=0)
        if self.allowed is not None:
            cost = np.where(self.allowed, cost, np.inf)
        return float(cost.min(axis=0).sum())

    def least_share(self) -> float:
        """Bound from below how much of its budgets any policy takes: above 1, none keeps all of them.

        With weights that sum to 1, the costs of a policy that keeps all budgets, relative to these, have a mean of at
        most 1; the bound is the largest, over some weights, of the least mean that a policy has (Lagrangian duality).
        """
        shares, ratios = self._shares(), np.linspace(0, 1, _RATIOS)
        # By two at a time: three that conflict only all together are found by the search.
        mixed = (r * one + (1 - r) * other for one, other in combinations_with_replacement(shares, 2) for r in ratios)
        return max((self._least(mean) for mean in mixed), default=0.0)

    def _least(self, shares: Array) -> float:
        """Sum of what each layer takes at least of [formats, layers]."""
        own = shares if self.allowed is None else np.where(self.allowed, shares, np.inf)
        return float(own.min(axis=0).sum())

    def _shares(self) -> list[Array]:
        """Part of each finite budget that a layer takes with one format at all its steps: [formats, layers] each.

        Not less is taken with several formats: at each step one of these, and of each its stored weight.
        """
        costs = [(item.cost * self.active(item.cost.shape[1]).sum(axis=0), item.limit) for item in self.additive]
        if self.storage is not None:
            costs.append((self.storage.bytes[self.storage.grids], self.storage.limit))
        return [cost / limit for cost, limit in costs if 0 < limit < math.inf]


@dataclass(frozen=True)
class CostModel:
    """Tells what policies cost.

    Attributes:
        storage: of weights, without a limit.
        activation_bits: [formats, layers]: of one step; those of all cells sum to a mean.
        active: [steps, layers]: which layers run at which step.
        ms: [formats, layers]: of one step; None where nobody knows.
        rest_ms: of everything that is not quantized, in all steps.
        rest_bytes: of what a transform has in 16 bits, which counts as resident beside the weights.
    """

    storage: Storage
    activation_bits: Array
    active: Active
    ms: Array | None = None
    rest_ms: float = 0.0
    rest_bytes: int = 0

    @classmethod
    def of(
        cls,
        formats: Sequence[Format],
        shapes: Sequence[LayerShape],
        steps: int,
        ms: Array | None = None,
        rest_ms: float = 0.0,
        rest_bytes: int = 0,
        cells: Active | None = None,
    ) -> CostModel:
        """From shapes; `cells` as of `Storage`."""
        operations = np.array([s.in_features * s.out_features * s.tokens for s in shapes], dtype=np.float64)
        bits = np.array([[f.moved_activation_bits(s.in_features) for s in shapes] for f in formats])
        active = np.ones((steps, len(shapes)), dtype=bool) if cells is None else cells
        share = operations / float(operations @ active.sum(axis=0))
        storage = Storage.of(formats, shapes, np.inf, cells=cells)
        return cls(storage, bits * share, active, ms, rest_ms, rest_bytes)

    def costs(self, rows: Sequence[Assignment]) -> Costs:
        """Of a whole policy."""
        array = np.array(rows, dtype=np.int64)
        layers = np.arange(array.shape[1])
        return Costs(
            resident_bytes=round(self.storage.used(array)) + self.rest_bytes,
            activation_bits=float(self.activation_bits[array, layers][self.active].sum()),
            ms=None if self.ms is None else float(self.ms[array, layers][self.active].sum()) + self.rest_ms,
        )

    def least_departure(self, reference: int, steps: int) -> float:
        """How much of its bytes or time, whichever is more, a policy needs beside one format everywhere to differ.

        Args:
            reference: index of that format.
            steps: of the loop.

        Returns:
            A part of what that format costs; 0 where a policy that costs no more differs.
        """
        layers = self.storage.bytes.shape[1]
        own = self.costs([(reference,) * layers] * steps)
        time = self.activation_bits if self.ms is None else self.ms
        size = self.storage.bytes[self.storage.grids]
        more_bytes, more_time = size - size[reference], time - time[reference]
        # An activation differs at one step; a weight, which is stored once, at all.
        stored = (self.storage.grids != self.storage.grids[reference])[:, None]
        times = np.where(stored, self.active.sum(axis=0), 1)
        parts = np.maximum(more_bytes / own.resident_bytes, times * more_time / own.time)
        others = np.delete(parts, reference, axis=0)
        return max(float(others.min(initial=np.inf)), 0.0) if len(others) else 0.0

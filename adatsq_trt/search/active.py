"""Cells (step, layer) of a policy that count: a layer of one expert does not run at the other expert's steps.

Knapsack problems have an item for each cell that counts, in the order of steps and then of layers. In rows of format
indices the others are 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.candidates import Assignment

Active = NDArray[np.bool_]  # [steps, layers]
NumberT = TypeVar("NumberT", np.float64, np.int64)


def cells_of(values: NDArray[NumberT], active: Active, axis: int = 0) -> NDArray[NumberT]:
    """[…, steps, layers, …] → […, cells, …]; `axis` is that of the steps."""
    flat = values.reshape(*values.shape[:axis], active.size, *values.shape[axis + 2 :])
    return flat if active.all() else np.compress(active.ravel(), flat, axis=axis)


def spread(cells: NDArray[NumberT], active: Active, axis: int = 0) -> NDArray[NumberT]:
    """[…, cells, …] → […, steps, layers, …], 0 elsewhere."""
    flat = cells
    if not active.all():
        flat = np.zeros((*cells.shape[:axis], active.size, *cells.shape[axis + 1 :]), dtype=cells.dtype)
        np.moveaxis(flat, axis, 0)[active.ravel()] = np.moveaxis(cells, axis, 0)
    return flat.reshape(*cells.shape[:axis], *active.shape, *cells.shape[axis + 1 :])


def rows_of(chosen: NDArray[np.int64], active: Active) -> tuple[Assignment, ...]:
    """Format indices [steps, layers] as a policy."""
    return tuple(tuple(int(i) for i in row) for row in np.where(active, chosen, 0))


def parts(active: Active) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Steps and layers of each expert; all of them together where there is one."""
    for row in np.unique(active, axis=0)[::-1]:
        yield np.flatnonzero((active == row).all(axis=1)), np.flatnonzero(row)


def names_of(rows: Sequence[Sequence[int]], names: Sequence[str], active: Active) -> tuple[tuple[str | None, ...], ...]:
    """Format indices as names; None where a layer does not run."""
    return tuple(
        tuple(names[index] if runs else None for index, runs in zip(row, own, strict=True))
        for row, own in zip(rows, active, strict=True)
    )


def indices_of(rows: Sequence[Sequence[str | None]], names: Sequence[str]) -> tuple[Assignment, ...]:
    """The reverse of `names_of`."""
    index = {name: i for i, name in enumerate(names)}
    return tuple(tuple(0 if name is None else index[name] for name in row) for row in rows)

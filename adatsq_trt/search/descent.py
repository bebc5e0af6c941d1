"""The inner loop of `joint.coordinate_descent`, compiled: a plan of Flux-dev's size takes eight million iterations.

Compilation takes two seconds in each process. It is not kept: Numba would write beside the package.
"""

import numpy as np
from numba import njit

# NumPy sums blocks of so many numbers in eight interleaved parts, and longer rows by halves.
_BLOCK, _PARTS = 128, 8


@njit
def descent_pass(contributions, fixed, layers, order, together, by_layer, chosen, total, layer_totals):
    """Give every item its best format, one after another; returns whether any changed.

    Args:
        contributions: float64 [items, formats, rows].
        fixed: float64 [items, formats]: part of an item's cost that depends on nothing else; infinite where a format
            may not be taken.
        layers: int64 [items]: the layer of each.
        order: int64 [items].
        together: share of the error of all items together.
        by_layer: share of the errors of each layer's items together.
        chosen: int64 [items]; changed in place.
        total: float64 [rows]: contributions of all chosen formats; changed in place.
        layer_totals: float64 [layers, rows]: by layer; changed in place.
    """
    changed = False
    formats, rows = contributions.shape[1:]
    others, within, squares = np.empty(rows), np.empty(rows), np.empty(rows)
    for item in order:
        own, layer, now = contributions[item], layers[item], chosen[item]
        for r in range(rows):
            others[r], within[r] = total[r] - own[now, r], layer_totals[layer, r] - own[now, r]
        best, least = 0, np.inf
        for f in range(formats):
            if fixed[item, f] == np.inf:
                continue
            cost = together * _error(others, own[f], squares) + fixed[item, f]
            cost += by_layer * _error(within, own[f], squares)
            if cost < least:
                best, least = f, cost
        if best != now:
            chosen[item], changed = best, True
            for r in range(rows):
                total[r], layer_totals[layer, r] = others[r] + own[best, r], within[r] + own[best, r]
    return changed


@njit
def descend_layer(products, fixed, by_layer, chosen, sweeps):
    """The formats of one layer's items, where other layers do not matter; returns them.

    Args:
        products: float64 [items, formats, items, formats]: Σ_r c_r c'_r of two contributions.
        fixed: float64 [items, formats]: as of `descent_pass`.
        by_layer: share of the error of the items together.
        chosen: int64 [items]; to begin with.
        sweeps: most of them.
    """
    items, formats = fixed.shape
    for _ in range(sweeps):
        changed = False
        for item in range(items):
            best, least = 0, np.inf
            for f in range(formats):
                if fixed[item, f] == np.inf:
                    continue
                along = 0.0
                for other in range(items):
                    if other != item:
                        along += products[item, f, other, chosen[other]]
                cost = by_layer * (products[item, f, item, f] + 2 * along) + fixed[item, f]
                if cost < least:
                    best, least = f, cost
            if best != chosen[item]:
                chosen[item], changed = best, True
        if not changed:
            break
    return chosen


@njit
def _error(others, own, squares):
    """The sum of (others + own)², in NumPy's order: its last digit decides between equals."""
    for r in range(len(own)):
        value = others[r] + own[r]
        squares[r] = value * value
    return _pairwise(squares, 0, len(squares))


@njit
def _pairwise(values, start, count):
    if count > _BLOCK:
        half = count // 2
        half -= half % _PARTS
        return _pairwise(values, start, half) + _pairwise(values, start + half, count - half)
    whole = count - count % _PARTS
    result = 0.0
    if whole:
        parts = values[start : start + _PARTS].copy()
        for i in range(start + _PARTS, start + whole, _PARTS):
            for j in range(_PARTS):
                parts[j] += values[i + j]
        result = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]))
    for i in range(start + whole, start + count):
        result += values[i]
    return result

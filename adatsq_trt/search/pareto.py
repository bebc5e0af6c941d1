"""Pareto fronts in the plane of (bits, error), both to be small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(points: Sequence[tuple[float, float]], slack: float = 0.0) -> list[int]:
    """Indices of the points that no other dominates, in the order given.

    A point is dominated when another costs no more bits and its error, even enlarged by `slack`, is smaller; of equal
    points the first stays. Slack keeps near misses: the final error is not monotone in a prefix's error.

    Args:
        points: (bits, error).
        slack: relative: 0.1 keeps whatever is less than 10 % worse.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1], i))
    kept, best = [], np.inf
    for i in order:
        error = points[i][1]
        if error < best * (1 + slack):
            kept.append(i)
        best = min(best, error)
    return sorted(kept)


def crowding_distance(points: Sequence[tuple[float, float]]) -> list[float]:
    """Distance to the neighbours along each axis, scaled to the axis' range; ends are infinitely far (NSGA-II)."""
    distance = np.zeros(len(points))
    for axis in (0, 1):
        values = np.array([p[axis] for p in points])
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]] or 1.0
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance.tolist()

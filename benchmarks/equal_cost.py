"""Error of uniform formats at the cost of a policy: policies of unequal cost are not compared without it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def uniform_error(cost: float, uniform: Iterable[tuple[float, float]]) -> float:
    """Error that uniform formats have at some cost: its logarithm on straight lines between them.

    Of the formats only those count that no cheaper one beats. Below the cheapest its error holds, above the dearest
    that one's: a dearer policy has nothing better to be compared with.

    Args:
        cost: of the policy: bytes, bits or milliseconds.
        uniform: costs and errors of uniform formats; one without error says nothing between formats and is left out.

    Raises:
        ValueError: no format has an error.
    """
    front: list[tuple[float, float]] = []
    for own, error in sorted(uniform):
        if error > 0 and (not front or error < front[-1][1]):
            front.append((own, error))
    if not front:
        raise ValueError("no uniform format with an error above 0 to compare with")
    costs, errors = zip(*front, strict=True)
    return float(np.exp(np.interp(cost, costs, np.log(errors))))

"""Allocation under the accumulated error: coordinate descent on a second-order model of the final picture.

Single errors do not simply add: the same rounded weight errs the same way at every step. With the signed contributions
c of `sensitivity`, a choice of formats has the predicted error Σ_r (Σ_i c[f_i, i, r])². A few hundred rows cannot
tell real cancellation from luck among a thousand choices, so the model is shrunk towards its diagonal:

    (1 - shrink) Σ_r (Σ_i c_i)² + shrink Σ_i Σ_r c_i² + price Σ_i bits_i.

Seen on digits-flux at a mean of 4 bits, 256 held-out samples, 1,024 rows: shrink 1 gives 0.55 of uniform w4a4's error,
0.5 gives 0.36, 0.2 gives 0.54 (predicted far better than it is: fitted luck).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.search.candidates import Array, spend_the_rest, steepest_price, tiers

SWEEPS = 6
Choice = NDArray[np.int64]


def descend(contributions: Array, errors: Array, bits: Array, weight: Array, price: float, shrink: float) -> Choice:
    """Formats that no single change improves (or the best after a few sweeps).

    Args:
        contributions: [formats, items, rows].
        errors: [formats, items]: the diagonal, possibly a better estimate than the rows give.
        bits: [formats], ascending.
        weight: [items]: how many (step, layer) an item stands for.
        price: error per bit.
        shrink: 0 trusts the rows, 1 adds single errors only.

    Returns:
        [items] format indices.
    """
    items = np.arange(contributions.shape[1])
    chosen = tiers(errors, bits, weight, price)
    total = contributions[chosen, items].sum(axis=0)
    fixed = shrink * errors + price * bits[:, None] * weight
    order = np.random.default_rng(0).permutation(items)
    for _ in range(SWEEPS):
        changed = False
        for item in order:
            others = total - contributions[chosen[item], item]
            cost = (1 - shrink) * np.square(others + contributions[:, item]).sum(axis=1) + fixed[:, item]
            best = int(cost.argmin())
            if best != chosen[item]:
                total, chosen[item], changed = others + contributions[best, item], best, True
        if not changed:
            break
    return chosen


def allocate_jointly(
    contributions: Array, errors: Array, bits: Array, weight: Array, budget: float, shrink: float
) -> tuple[Choice, float]:
    """The formats within a budget, and their price.

    Args:
        contributions: [formats, items, rows].
        errors: [formats, items].
        bits: [formats], ascending.
        weight: [items].
        budget: largest sum of weight * bits; at least that of the cheapest format everywhere.
        shrink: see the module.
    """
    high = 8 * steepest_price(errors, bits, weight)  # accumulated errors save more per bit than single ones
    low, chosen, price = high * 1e-9, np.zeros(errors.shape[1], dtype=np.int64), high
    for _ in range(18):
        middle = float(np.sqrt(low * high))
        trial = descend(contributions, errors, bits, weight, middle, shrink)
        if (bits[trial] * weight).sum() <= budget + 1e-9:
            chosen, price, high = trial, middle, middle
        else:
            low = middle
    return spend_the_rest(errors, bits, weight, budget, chosen), price

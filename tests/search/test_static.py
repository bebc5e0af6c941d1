"""Rivals that do not see the step, or the layer."""

import itertools

import numpy as np
import pytest
import torch

from adatsq_trt.formats import FORMATS
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.search.static import layer_only, time_only, uniform

SET = tuple(FORMATS[name] for name in ("w3a3", "w4a4", "w8a8"))
BITS = np.array([3.0, 4.0, 8.0])
STEPS, LAYERS = 4, 5


def random_sensitivity(seed: int) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    common, own = (torch.randn(3, s, LAYERS, 30, generator=generator) for s in (1, STEPS))
    size = torch.tensor([1.0, 0.5, 0.03])[:, None, None, None]
    spread = torch.exp(torch.randn(1, STEPS, LAYERS, 1, generator=generator))
    return Sensitivity(SET, (common + own) * size * spread)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [3.0, 3.7, 4.5, 8.0])
def test_static_policies_keep_the_budget_and_their_shape(seed: int, budget: float) -> None:
    sensitivity = random_sensitivity(seed)
    by_layer, by_step = layer_only(sensitivity, BITS, budget), time_only(sensitivity, BITS, budget)
    for rows in (*by_layer, *by_step):
        assert np.shape(rows) == (STEPS, LAYERS)
        assert BITS[np.array(rows)].mean() <= budget + 1e-9
    assert all(len(set(rows)) == 1 for rows in by_layer)
    assert all(len(set(row)) == 1 for rows in by_step for row in rows)
    assert len(set(by_layer)) == len(by_layer) >= 1


@pytest.mark.parametrize("seed", range(3))
def test_the_best_proposals_are_near_the_best_static_policies(seed: int) -> None:
    sensitivity, budget = random_sensitivity(seed), 4.5
    contributions = sensitivity.contributions.double().numpy()

    def error(rows: tuple[tuple[int, ...], ...]) -> float:
        chosen = np.take_along_axis(contributions, np.array(rows)[None, :, :, None], 0)
        return float(np.square(chosen.sum(axis=(0, 1, 2))).sum())

    def near(proposals: list[tuple[tuple[int, ...], ...]], everything: list[tuple[tuple[int, ...], ...]]) -> None:
        within = [rows for rows in everything if BITS[np.array(rows)].mean() <= budget]
        best = min(error(rows) for rows in within)
        assert min(error(rows) for rows in proposals) <= 1.5 * best

    near(layer_only(sensitivity, BITS, budget), [(row,) * STEPS for row in itertools.product(range(3), repeat=LAYERS)])
    near(
        time_only(sensitivity, BITS, budget),
        [tuple((i,) * LAYERS for i in row) for row in itertools.product(range(3), repeat=STEPS)],
    )


def test_uniform_is_one_format_everywhere() -> None:
    assert uniform(2, 3, 4) == ((2, 2, 2, 2),) * 3

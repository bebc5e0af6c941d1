"""Latents of a beam that go through the model together."""

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.execution import InProcess
from adatsq_trt.models.format_store import FormatStore
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.search.simulation import Simulation
from tests.search.conftest import SET


class Counting(InProcess):
    """Workers that count their units."""

    def __init__(self) -> None:
        self.units = 0

    def map(self, function, common, items):
        for item in items:
            self.units += 1
            yield function(common.content, item)


@pytest.mark.parametrize(("together", "units"), [(1, 5), (2, 3), (8, 2)])
def test_equal_assignments_share_a_call_and_results_keep_their_order(
    samples: Samples, latents: Tensor, store: FormatStore, together: int, units: int
) -> None:
    with SimulatedModel(samples.adapter, store).installed() as model:
        cheap, dear = ((index,) * len(model.layers) for index in (0, 2))
        moves = [(latents[1] + 0.1 * i, (cheap, dear, cheap, cheap, dear)[i]) for i in range(5)]
        workers = Counting()
        simulation = Simulation(model, SET, samples.schedule, samples.guidance, workers, together)
        found = list(simulation.advance(samples, 1, moves))
        alone = Simulation(model, SET, samples.schedule, samples.guidance)
        expected = [next(iter(alone.advance(samples, 1, [move]))) for move in moves]
    assert workers.units == units
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)

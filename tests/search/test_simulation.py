"""Latents of a beam that go through the model together."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.errors import UnsupportedFormatError
from adatsq_trt.execution import InProcess
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.search import resume
from adatsq_trt.search.resume import Scorer
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.solver import State
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
    samples: Samples, latents: Tensor, store: CandidateWeights, together: int, units: int
) -> None:
    with SimulatedModel(samples.adapter, store).installed() as model:
        cheap, dear = ((index,) * len(model.layers) for index in (0, 2))
        moves = [(State(latents[1] + 0.1 * i), (cheap, dear, cheap, cheap, dear)[i]) for i in range(5)]
        executor = Counting()
        simulation = Simulation(model, SET, samples.schedule, samples.guidance, executor, together)
        found = list(simulation.advance(samples, 1, moves))
        alone = Simulation(model, SET, samples.schedule, samples.guidance)
        expected = [next(iter(alone.advance(samples, 1, [move]))) for move in moves]
    assert executor.units == units
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.latent, other.latent, rtol=1e-4, atol=1e-5)


def test_a_policy_that_overflows_names_step_layer_and_format(
    samples: Samples, store: CandidateWeights, tmp_path: Path
) -> None:
    """Two layers of one format have an infinite scale; it is the first in the order of execution that is named."""
    layers = list(samples.adapter.quantizable_layers())
    bad, fmt = (layers[1], layers[-1]), SET[1]
    weights = {name: dict(own) for name, own in store.weights.items()}
    for layer in bad:
        whole = weights[fmt.name][layer]
        assert whole.scales is not None
        weights[fmt.name][layer] = replace(whole, scales=whole.scales * torch.inf)
    with SimulatedModel(samples.adapter, replace(store, weights=weights)).installed() as model:
        simulation = Simulation(model, SET, samples.schedule, samples.guidance)
        scorer = Scorer(simulation, samples, tmp_path)
        fine, one = (0,) * len(layers), (1,) * len(layers)
        rows = (fine, one, *(fine,) * (samples.schedule.steps - 2))
        assert all(isfinite(score.error) for score in scorer.scores([(fine,) * samples.schedule.steps]))
        with pytest.raises(UnsupportedFormatError, match=f"step 1: layer '{bad[0]}' in format '{fmt.name}' gives NaN"):
            list(scorer.scores([rows]))
    assert not any("null" in file.read_text() for file in tmp_path.rglob("*.json"))


def test_an_overflow_outside_the_layers_blames_none_of_them(
    samples: Samples, store: CandidateWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double for errors that overflow, as after the last layer of the last step."""
    layers = list(samples.adapter.quantizable_layers())
    with SimulatedModel(samples.adapter, store).installed() as model:
        simulation = Simulation(model, SET, samples.schedule, samples.guidance)
        scorer = Scorer(simulation, samples, tmp_path)
        monkeypatch.setattr(resume, "row_errors", lambda latents, _: torch.full((len(latents),), torch.inf).double())
        rows = ((0,) * len(layers),) * samples.schedule.steps
        with pytest.raises(
            UnsupportedFormatError, match=f"^a policy of {SET[0].name} gives latents with NaN"
        ) as caught:
            list(scorer.scores([rows]))
    assert layers[0] not in str(caught.value)

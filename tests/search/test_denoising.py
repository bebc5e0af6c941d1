"""The beam's problem with a scheduler that combines predictions of several steps: a path's state has these."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, latent_mse, state_tensors, trajectory, trajectory_states
from adatsq_trt.calibration.units import measured_trajectory
from adatsq_trt.execution import InProcess
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.schedule import make_schedule
from adatsq_trt.search.beam import Pruning
from adatsq_trt.search.denoising import DenoisingProblem, format_bits, projected_error
from adatsq_trt.search.plan import make_plan
from adatsq_trt.search.resume import measure_sensitivity, search_columns
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.solver import State
from tests.search.conftest import SET
from tests.search.test_resume import BUDGET, KilledError, dies_at, figures, ignore

STEPS = 4


@pytest.fixture(scope="module")
def looking_back(samples: Samples) -> Samples:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return replace(samples, schedule=make_schedule(UniPCMultistepScheduler(**flow), STEPS))


@pytest.fixture(scope="module")
def states(looking_back: Samples) -> list[State[Tensor]]:
    noise, here = looking_back.noise(), InProcess()
    whole = [State(noise), *measured_trajectory(here, here.share(looking_back), noise, STEPS)]
    tensors = state_tensors(whole)
    again = trajectory_states(tensors, looking_back.schedule.solver.memory)
    assert torch.equal(tensors["latents"], trajectory(looking_back))
    for one, other in zip(whole, again, strict=True):
        assert len(one.clean) == len(other.clean)
        assert all(map(torch.equal, [one.latent, *one.clean], [other.latent, *other.clean]))
    assert len(whole[-1].clean) == looking_back.schedule.solver.memory == 2
    return whole


@pytest.fixture(scope="module")
def make_problem(
    looking_back: Samples,
    states: list[State[Tensor]],
    start: Tensor,
    store: CandidateWeights,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], DenoisingProblem]]:
    latents, folder = state_tensors(states)["latents"], tmp_path_factory.mktemp("sensitivity")
    # Scales of static formats are of three steps.
    own = replace(store, scales={name: scale[[0, 1, 2, 2]] for name, scale in store.scales.items()})
    with pytest.raises(KilledError):
        measure_sensitivity(looking_back, latents, start, SET, own, folder, dies_at(2), InProcess())
    killed = measure_sensitivity(looking_back, latents, start, SET, own, folder, ignore, InProcess())
    fresh = tmp_path_factory.mktemp("whole")
    sensitivity, adjoints = measure_sensitivity(looking_back, latents, start, SET, own, fresh, ignore, InProcess())
    assert torch.equal(killed[0].contributions, sensitivity.contributions)
    for one, other in zip(killed[1], adjoints, strict=True):
        assert all(map(torch.equal, [one.latent, *one.clean], [other.latent, *other.clean]))
    with SimulatedModel(looking_back.adapter, own).installed() as model:
        simulation = Simulation(model, SET, looking_back.schedule, looking_back.guidance)
        plan = make_plan(sensitivity, format_bits(SET), BUDGET, 3)
        yield lambda: DenoisingProblem(looking_back, simulation, states, adjoints, plan, BUDGET)


def test_the_beams_errors_are_those_of_its_policies(
    make_problem: Callable[[], DenoisingProblem], looking_back: Samples, states: list[State[Tensor]], tmp_path: Path
) -> None:
    problem = make_problem()
    model = problem.simulation.model
    for path in search_columns(problem, Pruning(3, 0.1), tmp_path, ignore):
        rows = [{n: SET[i] for n, i in zip(model.layers, row, strict=True)} for row in path.assignments]
        final = trajectory(looking_back, lambda step, rows=rows: model.assign(rows[step], step))[-1]
        assert path.error == latent_mse(final, states[-1].latent)
        assert path.error > 0


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_beam_goes_on_with_what_its_paths_carry(
    make_problem: Callable[[], DenoisingProblem], tmp_path: Path, count: int
) -> None:
    expected = search_columns(make_problem(), Pruning(2, 0.1), tmp_path / "whole", ignore)
    with pytest.raises(KilledError):
        search_columns(make_problem(), Pruning(2, 0.1), tmp_path / "killed", dies_at(count))
    found = search_columns(make_problem(), Pruning(2, 0.1), tmp_path / "killed", ignore)
    assert figures(found) == figures(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, [one.state.latent, *one.state.clean], [other.state.latent, *other.state.clean]))


def test_errors_of_earlier_predictions_count(
    make_problem: Callable[[], DenoisingProblem], looking_back: Samples, states: list[State[Tensor]], start: Tensor
) -> None:
    """To first order; the latent alone would say that there is no error."""
    problem, step = make_problem(), 2
    problem.simulation.model.assign(None, 0)
    generator = torch.Generator().manual_seed(0)
    nudge = tuple(1e-2 * torch.randn(value.shape, generator=generator) for value in states[step].clean)
    ends = []
    for sign in (1, -1):
        clean = tuple(value + sign * own for value, own in zip(states[step].clean, nudge, strict=True))
        state = State(states[step].latent, clean)
        for later in range(step, STEPS):
            state = looking_back.step(state, later)
        ends.append(state.latent)
    clean = tuple(value + own for value, own in zip(states[step].clean, nudge, strict=True))
    predicted = projected_error(State(states[step].latent, clean), states[step], problem.adjoints[step])
    measured = (start * (ends[0] - ends[1]) / 2).double().flatten(2).sum(dim=2).flatten()
    measured = measured / (len(measured) * start[0, 0].numel()) ** 0.5
    torch.testing.assert_close(torch.from_numpy(predicted), measured, rtol=1e-2, atol=1e-6)
    assert measured.abs().max() > 1e-4

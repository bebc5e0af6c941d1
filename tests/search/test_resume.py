"""A search that is interrupted and taken up again finds the same as an undisturbed one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, latent_mse, trajectory
from adatsq_trt.execution import InProcess
from adatsq_trt.formats import FORMATS
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.search.beam import Path as BeamPath
from adatsq_trt.search.beam import Pruning
from adatsq_trt.search.denoising import DenoisingProblem, format_bits
from adatsq_trt.search.plan import make_plan
from adatsq_trt.search.resume import Score, Scorer, measure_sensitivity, search_columns
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.solver import State

SET = tuple(FORMATS[name] for name in ("w4a4", "fp8", "w8a8", "fp32"))
BITS, BUDGET = format_bits(SET), 7.0


class KilledError(Exception):
    pass


def dies_at(count: int) -> Callable[[], None]:
    """A progress callback that raises when it is called for the `count`-th time."""
    calls = 0

    def advance() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KilledError

    return advance


def ignore() -> None:
    pass


@pytest.fixture(scope="module")
def simulation(samples: Samples, store: CandidateWeights) -> Iterator[Simulation]:
    with SimulatedModel(samples.adapter, store).installed() as model:
        yield Simulation(model, SET, samples.schedule, samples.guidance)


@pytest.fixture(scope="module")
def measured(
    samples: Samples, latents: Tensor, start: Tensor, store: CandidateWeights, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sensitivity, list[State[Tensor]]]:
    return measure_sensitivity(
        samples, latents, start, SET, store, tmp_path_factory.mktemp("whole"), ignore, InProcess()
    )


@pytest.fixture
def make_problem(
    samples: Samples, latents: Tensor, simulation: Simulation, measured: tuple[Sensitivity, list[State[Tensor]]]
) -> Callable[[], DenoisingProblem]:
    plan = make_plan(measured[0], BITS, BUDGET, 3)
    states = [State(latent) for latent in latents]
    return lambda: DenoisingProblem(samples, simulation, states, measured[1], plan, BUDGET)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sensitivity_goes_on_after_the_last_finished_step(
    samples: Samples,
    latents: Tensor,
    start: Tensor,
    store: CandidateWeights,
    measured: tuple[Sensitivity, list[State[Tensor]]],
    tmp_path: Path,
    count: int,
) -> None:
    with pytest.raises(KilledError):
        measure_sensitivity(samples, latents, start, SET, store, tmp_path, dies_at(count), InProcess())
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "sensitivity").iterdir()}
    assert len(written) == count
    steps: list[None] = []
    resumed, adjoints = measure_sensitivity(
        samples, latents, start, SET, store, tmp_path, lambda: steps.append(None), InProcess()
    )
    assert torch.equal(resumed.contributions, measured[0].contributions)
    assert all(torch.equal(one.latent, other.latent) for one, other in zip(adjoints, measured[1], strict=True))
    assert len(steps) == 3  # progress counts what was there already
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())


def test_adjoints_end_with_the_projections(measured: tuple[Sensitivity, list[State[Tensor]]], start: Tensor) -> None:
    assert torch.equal(measured[1][-1].latent, start)
    assert [state.latent.shape for state in measured[1]] == [start.shape] * 4


def figures(paths: list[BeamPath[State[Tensor]]]) -> list[tuple[object, ...]]:
    return [(p.assignments, p.bits, p.error, p.estimate) for p in paths]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_beam_goes_on_after_the_last_finished_column(
    make_problem: Callable[[], DenoisingProblem], tmp_path: Path, count: int
) -> None:
    pruning, whole, interrupted = Pruning(2, 0.1), make_problem(), make_problem()
    expected = search_columns(whole, pruning, tmp_path / "whole", ignore)
    with pytest.raises(KilledError):
        search_columns(interrupted, pruning, tmp_path / "killed", dies_at(count))
    resumed, columns = make_problem(), list[None]()
    found = search_columns(resumed, pruning, tmp_path / "killed", lambda: columns.append(None))
    assert figures(found) == figures(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.state.latent, other.state.latent)
    assert resumed.calls == whole.calls > interrupted.calls - 1
    assert len(columns) == 3


def test_a_finished_beam_makes_no_more_calls(make_problem: Callable[[], DenoisingProblem], tmp_path: Path) -> None:
    first, second = make_problem(), make_problem()
    paths = search_columns(first, Pruning(2, 0.1), tmp_path, ignore)
    second.advance = lambda *_: pytest.fail("the column was there")  # type: ignore[method-assign]
    assert figures(search_columns(second, Pruning(2, 0.1), tmp_path, ignore)) == figures(paths)
    assert second.calls == first.calls > 0


def test_the_beams_errors_are_those_of_its_policies(
    make_problem: Callable[[], DenoisingProblem], samples: Samples, latents: Tensor, tmp_path: Path
) -> None:
    problem = make_problem()
    model = problem.simulation.model
    for path in search_columns(problem, Pruning(3, 0.1), tmp_path, ignore):
        rows = [{n: SET[i] for n, i in zip(model.layers, row, strict=True)} for row in path.assignments]
        final = trajectory(samples, lambda step, rows=rows: model.assign(rows[step], step))[-1]
        assert path.error == latent_mse(final, latents[-1])
        assert path.bits == sum(SET[i].bits for row in path.assignments for i in row) <= BUDGET * 3 * 17


def test_a_path_on_the_reference_is_expected_to_err_as_the_plan(
    make_problem: Callable[[], DenoisingProblem], latents: Tensor
) -> None:
    problem = make_problem()
    assert problem.error(State(latents[0]), 0) == problem.plan.expected_error(torch.zeros(6).double().numpy(), 0)
    assert problem.error(State(latents[3]), 3) == 0.0
    assert problem.remaining_error(3, BUDGET * 3 * 17 + 1) == float("inf")


def test_a_score_is_measured_once(samples: Samples, latents: Tensor, simulation: Simulation, tmp_path: Path) -> None:
    rows, model = (((0,) * 17),) * 3, simulation.model
    scorer = Scorer(simulation, samples, tmp_path)
    torch.testing.assert_close(scorer.reference, latents[-1])
    (error,) = (score.error for score in scorer.scores([rows]))
    model.assign(None, 0)
    fake = trajectory(samples, lambda step: model.assign(dict.fromkeys(model.layers, SET[0]), step))[-1]
    assert error == pytest.approx(latent_mse(fake, scorer.reference), rel=1e-12)
    assert error > 0

    class Dead(SimulatedModel):
        def __init__(self) -> None:
            self.layers, self.adapter = model.layers, model.adapter

        def assign(self, formats: object, step: int) -> None:
            raise KilledError

    again = Scorer(Simulation(Dead(), SET, samples.schedule, samples.guidance), samples, tmp_path)
    assert [score.error for score in again.scores([rows, rows])] == [error, error]
    assert torch.equal(again.reference, scorer.reference)
    with pytest.raises(KilledError):
        list(again.scores([(((1,) * 17),) * 3]))


def test_batches_have_their_own_scores(samples: Samples, simulation: Simulation, tmp_path: Path) -> None:
    rows = (((0,) * 17),) * 3
    batches = (samples.part(slice(0, 1)), samples.part(slice(1, 2)), samples)
    first, second, both = (next(Scorer(simulation, batch, tmp_path).scores([rows])).error for batch in batches)
    assert first != second
    assert both == pytest.approx((first + second) / 2, rel=0.05)


def test_policies_are_scored_in_order_and_each_once(samples: Samples, simulation: Simulation, tmp_path: Path) -> None:
    low, high = (((0,) * 17),) * 3, (((2,) * 17),) * 3
    scorer = Scorer(simulation, samples, tmp_path)
    (known,) = scorer.scores([high])
    one, other, again = scorer.scores([low, high, low])
    assert np.array_equal(one.errors, again.errors)
    assert np.array_equal(other.errors, known.errors)
    assert one.error > other.error


def test_one_wild_sample_counts_for_no_more_than_twenty_median_ones() -> None:
    errors = torch.tensor([1.0, 1.0, 1.0, 1.0, 996.0], dtype=torch.float64)
    score = Score(errors.numpy())
    assert score.error == 200.0
    assert score.capped_error == pytest.approx((4 + 20) / 5)
    assert score.standard_error == pytest.approx(float(errors.std()) / 5**0.5)
    alike = Score(errors[:4].numpy())
    assert alike.capped_error == alike.error == 1.0
    assert Score(errors[:1].numpy()).standard_error == 0.0

"""How the step of a pipeline is known that keeps its timesteps on a device."""

import pytest
import torch

from adatsq_trt.engines.step_clock import StepClock
from adatsq_trt.errors import MismatchError
from adatsq_trt.schedule import Schedule
from tests.doubles.host_device import DEVICE, OnDevice, Transfers

SCHEDULE = Schedule((1.0, 0.9, 0.6, 0.3, 0.0), (1000.0, 900.0, 600.0, 300.0), {})


def there(step: int) -> torch.Tensor:
    with OnDevice():
        return torch.full((2,), SCHEDULE.model_time(step), device=DEVICE)


def test_steps_follow_in_order_and_the_first_is_read() -> None:
    clock = StepClock()
    with Transfers() as transfers:
        for first in (0, 2):  # the second generation begins in the middle
            assert [clock.step(there(step), SCHEDULE) for step in range(first, 4)] == list(range(first, 4))
            clock.finish()
    assert transfers.to_host == 2 * (8 + 1)


def test_branches_share_a_step() -> None:
    clock, seen = StepClock(), []
    for step in range(4):
        for branch in ("cond", "uncond") if step < 3 else ("cond",):
            clock.enter(branch)
            seen.append(clock.step(there(step), SCHEDULE))
    assert seen == [0, 0, 1, 1, 2, 2, 3]
    clock.enter("cond")
    assert clock.step(there(0), SCHEDULE) == 0, "another generation, without a word of its end"


def test_an_index_that_is_told_is_not_read() -> None:
    clock = StepClock()
    with Transfers() as transfers:
        for step in (0, 1, 2):
            clock.enter("cond", step, SCHEDULE.steps)
            assert clock.step(there(step), SCHEDULE) == step
        assert transfers.to_host == 0
    clock.enter("cond", 0, 2)  # of a loop that has other steps: the timestep says which
    assert StepClock().step(there(2), SCHEDULE) == 2


@pytest.mark.parametrize("told", [False, True])
def test_a_timestep_that_is_not_its_steps_makes_nan(told: bool) -> None:
    clock, velocity = StepClock(), torch.ones(2)
    for step, passed in ((0, 0), (1, 1), (2, 3)):
        clock.enter("cond", *((step, SCHEDULE.steps) if told else ()))
        clock.step(there(passed), SCHEDULE)
    with OnDevice():
        assert clock.checked(velocity.to(DEVICE)).content.isnan().all()
    with pytest.raises(MismatchError, match="the pipeline's timesteps are not the bundle's"):
        clock.finish()
    clock.enter(None)
    assert clock.step(there(1), SCHEDULE) == 1
    with OnDevice():
        assert clock.checked(velocity.to(DEVICE)).content.isfinite().all()


def test_the_first_timestep_must_be_one_of_the_schedules() -> None:
    with pytest.raises(MismatchError, match=r"the nearest step of the bundle is 0\.6"):
        StepClock().step(there(2) + 0.1, SCHEDULE)

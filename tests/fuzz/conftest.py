"""How long to fuzz: a short, repeatable round in the test suite; `make fuzz SECONDS=600` goes on with fresh inputs."""

import os
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from tests.cli.conftest import CommandLine

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FUZZ = settings(
    derandomize=not SECONDS,
    database=None,
    deadline=None,
    max_examples=100 if SECONDS else 40,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def go_on(request: pytest.FixtureRequest) -> Callable[[Callable[[], None]], None]:
    """Calls a round of examples, again and again until this test's share of the time is used up."""

    def rounds(one_round: Callable[[], None]) -> None:
        end = time.monotonic() + SECONDS / len(request.session.items)
        one_round()
        while time.monotonic() < end:
            one_round()

    return rounds


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)

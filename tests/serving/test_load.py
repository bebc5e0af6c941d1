"""The load run of benchmarks/serving, on two models of different lengths."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.server import Server
from benchmarks.serving.load import LoadRun
from tests.serving.conftest import DIGITS, TINY

pytestmark = pytest.mark.serving
REQUESTS, CLIENTS = 2000, 16


def test_load(
    repository: Path,
    tiny: BundleFiles,
    digits: BundleFiles,
    start: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = (TINY, DIGITS)
    first = start(repository, models)
    load = LoadRun({TINY: Bundle(tiny), DIGITS: Bundle(digits)}, REQUESTS, CLIENTS)
    result = load.run(first, restart=lambda: start(repository, models, ports=first.ports))
    with capsys.disabled():
        print(f"\n{result.table()}")
    assert (result.wrong_answers, result.errors_without_message) == (0, 0)
    assert result.answered + result.refused + result.cancelled == result.requests == REQUESTS
    assert min(result.answered, result.refused, result.cancelled, result.asked_again) > 10
    assert result.mean_batch > 1.5
    assert result.joined_places > 0
    warm, end = result.resident_bytes
    assert end < 1.1 * warm

"""The loop model when something fails that no client can make fail; tests/serving has the real server.

What the server provides only inside its own process is doubled here.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from tests.engines.triton_server.test_python_backend import arguments

MODULES = [f"adatsq_trt.engines.triton_server.{name}" for name in ("python_backend", "loop_model")]


class ErrorDouble:
    INVALID_ARG, INTERNAL, CANCELLED = 1, 2, 3

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


class ResponseDouble:
    def __init__(self, tensors: list[str] = [], error: ErrorDouble | None = None) -> None:  # noqa: B006  (as the server)
        self.tensors, self.error = tensors, error


class TensorDouble:
    @staticmethod
    def from_dlpack(name: str, capsule: object) -> str:
        return name


class MetricFamilyDouble:
    """Counters; those of a model called "uncounted" cannot be sent."""

    COUNTER = 0

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.labels: dict[str, str] = {}

    def Metric(self, labels: dict[str, str]) -> "MetricFamilyDouble":  # noqa: N802  (the server's name)
        self.labels = labels
        return self

    def increment(self, value: float) -> None:
        if self.labels["model"] == "uncounted":
            raise OSError("no metrics")


class RequestDouble:
    """A request and its sender; messages go into `said`."""

    def __init__(self, parameters: str = "", is_cancelled: Callable[[], bool] = lambda: False, **tensors: Any) -> None:
        self.said: SimpleQueue[ResponseDouble] = SimpleQueue()
        self.parameters, self.is_cancelled = lambda: parameters, is_cancelled
        self._tensors = {name: np.array(value, np.int64) for name, value in tensors.items()}

    def inputs(self) -> list[Any]:
        return [InputDouble(name, value) for name, value in self._tensors.items()]

    def get_response_sender(self) -> "RequestDouble":
        return self

    def send(self, response: ResponseDouble, flags: int) -> None:
        self.said.put(response)

    @property
    def answer(self) -> ResponseDouble:
        return self.said.get(timeout=60)


class InputDouble:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self._array = lambda: name, array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.fixture
def start(tiny_bundle: BundleFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes a loop model under a name; ends it with the test."""
    server: Any = ModuleType("triton_python_backend_utils")
    server.TRITONSERVER_RESPONSE_COMPLETE_FINAL, server.TritonError = 1, ErrorDouble
    server.InferenceResponse, server.Tensor, server.MetricFamily = ResponseDouble, TensorDouble, MetricFamilyDouble
    monkeypatch.setitem(sys.modules, server.__name__, server)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, models = import_module(MODULES[1]), []

    def make(name: str = "tiny") -> Any:
        write_repository([Deployment(name, tiny_bundle)], tmp_path / name)
        model = module.TritonPythonModel()
        model.initialize(arguments(tmp_path / name, name))
        models.append(model)
        return model

    yield make
    for model in models:
        model.finalize()
    for name in MODULES:
        del sys.modules[name]


def good() -> RequestDouble:
    return RequestDouble(prompt=[1], seed=[1])


def test_a_request_that_cannot_be_read(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    unreadable, after = RequestDouble("{", prompt=[1], seed=[1]), good()
    start().execute([unreadable, after])
    error = unreadable.answer.error
    assert error is not None
    assert error.message.startswith("reading the request failed: JSONDecodeError: Expecting property name")
    assert error.message.endswith("; the server's log says more")
    assert error.code == ErrorDouble.INTERNAL
    assert "Traceback" in caplog.text
    assert after.answer.error is None


def test_the_thread_that_answers_survives_what_nobody_foresaw(start: Callable[..., Any]) -> None:
    def gone() -> bool:
        raise ConnectionError("gone")

    model, lost, after = start(), RequestDouble(is_cancelled=gone, prompt=[1], seed=[1]), good()
    model.execute([lost])
    error = lost.answer.error
    assert error is not None
    assert error.message == "the request failed: ConnectionError: gone; the server's log says more"
    model.execute([after])
    assert after.answer.error is None


def test_a_message_that_cannot_be_sent(start: Callable[..., Any]) -> None:
    class Deaf(RequestDouble):
        def send(self, response: ResponseDouble, flags: int) -> None:
            raise ConnectionError("gone")

    model, after = start(), good()
    model.execute([Deaf(prompt=[1], seed=[1]), Deaf(prompt=[99], seed=[1]), after])
    assert after.answer.error is None


def test_counters_that_cannot_be_sent(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = start("uncounted")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            request = good()
            model.execute([request])
            assert request.answer.error is None
        model.finalize()
    assert "counters could not be sent" in caplog.text


def test_errors_of_ours_are_told_in_their_own_words(start: Callable[..., Any]) -> None:
    """As when a graph goes away; tests/serving has that in the real server."""
    model, lost = start(), RequestDouble(json.dumps({"text": "a 7"}), seed=[1])
    model.execute([lost])
    error = lost.answer.error
    assert error is not None
    assert error.message == "text 'a 7': not one of the bundle's 0 texts; ask with 'prompt', 0 to 2"
    assert error.code == ErrorDouble.INVALID_ARG

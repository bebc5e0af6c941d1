"""What a run says of its time before it starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adatsq_trt.execution import Executor
from adatsq_trt.stages import bundle, calibrate, duration
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.duration import in_words, remaining_work, time_needed
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.work import Work
from tests.stages.tiny_run import tiny_context


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"calibrate": 0.2}, "about 1 second"),
        ({"calibrate": 14, "search": 52.0}, "about 70 seconds (calibrate 14, search 50)"),
        ({"calibrate": 65, "quantize": 2, "search": 250}, "about 5 minutes (calibrate 1, search 4)"),
        ({"search": 3600 * 29, "bundle": 1000}, "about 30 hours (search 30)"),
        ({"search": 3600 * 1234.0}, "about 1200 hours (search 1200)"),
    ],
)
def test_it_is_told_in_one_unit(seconds: dict[str, float], words: str) -> None:
    assert in_words(seconds) == words


def test_stages_that_are_done_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_context(tmp_path / "run") as context:
        assert list(remaining_work(context, "search")) == ["calibrate", "quantize", "search"]
        run_stages(context, calibrate.NAME)
        assert list(remaining_work(context, "search")) == ["quantize", "search"]
        assert list(remaining_work(context, "calibrate")) == []
        monkeypatch.setattr(duration, "unit_seconds", lambda *_: pytest.fail("nothing is timed"))
        assert time_needed(context, "calibrate") == "time: nothing is left to compute"


def test_a_finished_run_takes_no_time(finished: Context) -> None:
    assert time_needed(finished, bundle.NAME) == "time: nothing is left to compute"


def test_seconds_are_counts_times_those_of_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {"embed": Work(), "calibrate": Work(call=100, fisher=10), "search": Work(call=600)}
    asked: list[Any] = []
    monkeypatch.setattr(duration, "unit_seconds", lambda *given: asked.append(given) or {"call": 0.5, "fisher": 4.0})
    monkeypatch.setattr(duration, "remaining_work", lambda *_: work)
    with tiny_context(tmp_path / "run") as context:
        told = time_needed(context, "search")
    assert told.startswith(
        "time: about 6 minutes (calibrate 2, search 5) on this machine, without encoding the prompts;"
    )
    assert asked == [(context, Work(call=700, fisher=10))]


def test_a_gpu_and_a_cluster_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Executor):
        """Never asked for anything."""

    monkeypatch.setattr(duration, "unit_seconds", lambda *_: pytest.fail("nothing is timed"))
    with tiny_context(tmp_path / "run") as context:
        told = time_needed(replace(context, executor=Elsewhere()), "bundle")
    assert told.startswith("time: not estimated, since other machines or a GPU compute")

"""A request that was checked: nothing is written before it runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import BudgetError, OutputError, UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.progress import Reporter
from adatsq_trt.report.numbers import size
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.stages.context import Memory
from adatsq_trt.stages.prepare import prepare


def test_the_run_directory_is_held_with_the_settings_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare("digits-flux", BuildConfig(target="cpu", steps=2, memory_limit="8GB"), "calibrate")
    assert list(tmp_path.iterdir()) == []
    assert prepared.memory.limit_bytes == 8_000_000_000
    folder = tmp_path / "run"
    with prepared.run(folder, Reporter()) as build:
        assert read_json_model(folder / SETTINGS_NAME, Settings) == prepared.settings == build.outline.settings
        assert build.outline.memory is prepared.memory
        assert f"up to {size(8_000_000_000)} are used" in prepared.needs
        with (
            pytest.raises(OutputError, match="is in use"),
            prepare("digits-flux", BuildConfig(target="cpu"), "calibrate").run(folder, Reporter()),
        ):
            raise AssertionError("two hold it")


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"budget_bits": 1.0}, BudgetError, "--budget-bits 1"),
        ({"memory_limit": "1MB"}, UserError, "--memory-limit 0.001 GB: stage"),
        ({"device": "tpu"}, UserError, "--device"),
        ({"steps": 2, "policy": "none.json"}, UserError, "none.json"),
    ],
)
def test_what_cannot_be_is_refused(choices: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prepare("digits-flux", BuildConfig(target="cpu", **choices), "bundle")


def test_memory_and_disk_are_told_with_the_stage_that_needs_most() -> None:
    memory = Memory(limit_bytes=16 * 10**9, needs={"calibrate": 2 * 10**9, "search": 3 * 10**9})
    prepared = replace(
        prepare("digits-flux", BuildConfig(target="cpu", steps=2), "quantize"),
        memory=memory,
        disk={"calibrate": 5 * 10**9, "quantize": 10**9},
    )
    told = prepared.needs.splitlines()
    assert told[0].startswith("memory: 3.0 GB at least, in stage 'search'; up to 16.0 GB")
    assert told[1].startswith("disk: about 6.0 GB, of which 'calibrate' writes 5.0 GB")

"""The benchmark of bundles: what it runs and says; how fast anything is, no test asks."""

from pathlib import Path

import pytest

from adatsq_trt.engines.benchmark import WARM_UP_ROUNDS, benchmark_bundles, machine
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import MissingFileError
from tests.engines.conftest import ASSIGNMENTS, STEP_ASSIGNMENTS


@pytest.fixture
def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, int]]:
    """(step, quantized, rows) of every call."""
    run: list[tuple[int, bool, int]] = []
    predict = Bundle.predict

    def recorded(self, step, inputs, quantized=True):
        run.append((step, quantized, len(inputs["timestep"])))
        return predict(self, step, inputs, quantized)

    monkeypatch.setattr(Bundle, "predict", recorded)
    return run


def test_cases_take_turns(tiny_bundle: BundleFiles, steps_run: list[tuple[int, bool, int]]) -> None:
    rounds, told = 4, list[None]()
    result = benchmark_bundles([tiny_bundle.folder], "onnxruntime", 3, rounds, lambda: told.append(None))
    assert len(told) == WARM_UP_ROUNDS + rounds
    firsts = [STEP_ASSIGNMENTS.index(i) for i in range(len(ASSIGNMENTS))]
    for turn in range(WARM_UP_ROUNDS + rounds):
        own = steps_run[turn * 5 : turn * 5 + 5]
        assert own == [(turn % 4, True, 6), *((first, True, 6) for first in firsts), (0, False, 6)]
    assert [timing.case for timing in result.timings] == [
        *("policy", "assignment 0", "assignment 1", "assignment 2", "full precision"),
    ]


def test_figures_belong_together(tiny_bundle: BundleFiles) -> None:
    result = benchmark_bundles([tiny_bundle.folder, tiny_bundle.folder.parent], "onnxruntime", 1, 5)
    assert {timing.bundle for timing in result.timings} == {str(tiny_bundle.folder), str(tiny_bundle.folder.parent)}
    for timing in result.timings:
        assert 0 < timing.least_ms <= timing.p10_ms <= timing.median_ms <= timing.p90_ms
        assert timing.steps_per_second == pytest.approx(1e3 / timing.median_ms)
        assert (timing.samples, timing.rows, timing.calls, timing.layout) == (1, 2, 5, "embedded")
        full = next(t for t in result.timings if (t.bundle, t.case) == (timing.bundle, "full precision"))
        assert timing.speed_up == pytest.approx(full.median_ms / timing.median_ms)
    policy, first = result.timings[:2]
    assert policy.formats == {"bf16": 1, "fp8": 4, "w8a8s": 3}
    assert first.formats == {"fp8": 1, "w8a8s": 1}
    assert result.timings[4].formats == {}


def test_the_machine_is_told() -> None:
    told = machine("onnxruntime")
    assert told.processor
    assert told.cores >= 1
    assert told.gpu is None
    flags = Path("/proc/cpuinfo").read_text().split()
    assert all(flag in flags for flag in told.instructions)
    assert "avx2" in told.instructions or "avx2" not in flags


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        benchmark_bundles([tmp_path], "onnxruntime", 1, 1)

"""What checks, times, draws and serves bundles, on the double of a GPU."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from adatsq_trt import api
from adatsq_trt.engines import accuracy, gpu_report
from adatsq_trt.engines.backends import plan_controls
from adatsq_trt.engines.benchmark import benchmark_bundles
from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.engines.comparison_plans import build_comparison_plans, in_16_bits
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from tests.doubles.tensorrt_on_onnxruntime import Library, PlanBook
from tests.engines.conftest import ASSIGNMENTS, STEP_ASSIGNMENTS
from tests.engines.gpu_runtime.conftest import LAYOUTS
from tests.engines.triton_server.test_python_backend import TritonModelException, arguments

SEEDS, PROMPTS = [5, 6], [0, 1]


@pytest.fixture
def compared(book: PlanBook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparison plans are known to the double, which computes the full-precision graph for each."""

    def build(files: BundleFiles, target: str, rows: int) -> dict[str, bytes]:
        plans = build_comparison_plans(files, target, rows)
        for name, plan in plans.items():
            book.enter_comparison(files, plan, rows, "bfloat16" if name == "16 bits" else "float32")
        return plans

    monkeypatch.setattr("adatsq_trt.engines.benchmark.build_comparison_plans", build)


# ------------------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_compares_every_plan(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path, layout: Layout
) -> None:
    report = accuracy.check(BundleFiles.open(planned(layout)), tmp_path, backend="auto")
    rows = [row for row in report.rows if row.variant == "plan" and row.block is None]
    assert [row.step for row in rows] == list(range(len(STEP_ASSIGNMENTS)))
    assert {(row.computed_by, row.reference) for row in rows} == {("rtx", "the cpu graph in onnxruntime")}
    assert all(0 < row.relative_error < row.relative_tolerance for row in rows)
    assert report.plan_loop is not None
    assert report.plan_loop.passed
    assert report.passed
    assert report.backend == "rtx"


def test_check_finds_plans_that_compute_something_else(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = plan_controls._StepTable._on_device
    monkeypatch.setattr(plan_controls._StepTable, "_on_device", lambda self, table: on_device(self, table / 8))
    report = accuracy.check(BundleFiles.open(planned("embedded")), tmp_path, backend="rtx")
    assert not report.passed
    assert report.plan_loop is not None
    assert not report.plan_loop.passed
    assert any(not row.passed for row in report.rows if row.variant == "plan")
    assert all(row.passed for row in report.rows if row.variant != "plan")


def test_plans_that_were_not_run_are_checked_anew(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path
) -> None:
    files = BundleFiles.open(planned("embedded"))
    assert accuracy.check(files, tmp_path).passed
    assert accuracy.passed_before(files, tmp_path, backend="onnxruntime") is not None
    assert accuracy.passed_before(files, tmp_path, backend="auto") is None


# -------------------------------------------------------------------------------------------------------- benchmark


def test_benchmark_has_16_bits_and_full_precision_beside_plans(
    planned: Callable[[Layout], Path], library: Library, compared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = benchmark_bundles([planned("embedded")], "auto", 2, 3)
    names = ["policy", *(f"assignment {i}" for i in range(len(ASSIGNMENTS))), "full precision", "16 bits"]
    assert [timing.case for timing in result.timings] == names
    medians = {timing.case: timing.median_ms for timing in result.timings}
    for timing in result.timings:
        assert timing.speed_up == pytest.approx(medians["full precision"] / timing.median_ms)
        assert timing.speed_up_16 == pytest.approx(medians["16 bits"] / timing.median_ms)
        assert (timing.backend, timing.rows) == ("rtx", 4)
    assert [start.kernels for start in result.starts] == [False, True]
    assert all(start.load_seconds > 0 and start.first_seconds > 0 for start in result.starts)
    assert all(start.memory_bytes > 0 for start in result.starts)
    assert result.machine.gpu == "a double of a GPU"


def test_the_model_in_16_bits_is_near(planned: Callable[[Layout], Path], tmp_path: Path) -> None:
    """onnx's own evaluator computes the converted graph, which ONNX Runtime lacks the kernels for."""
    import ml_dtypes
    import onnx
    from onnx.reference import ReferenceEvaluator

    files = BundleFiles.open(planned("embedded"))
    graph = files.graph("reference", None)
    narrow = in_16_bits(files.graph_path(graph), tmp_path, "bfloat16")
    onnx.checker.check_model(narrow, full_check=True)
    assert {value.type.tensor_type.elem_type for value in onnx.load(narrow).graph.input} == {onnx.TensorProto.BFLOAT16}
    feed = {s.name: files.reference[f"step_000.input.{s.name}"] for s in graph.inputs}
    (got,) = ReferenceEvaluator(str(narrow)).run(None, {n: v.astype(ml_dtypes.bfloat16) for n, v in feed.items()})
    wanted = files.reference["step_000.full_precision"]
    assert 0 < np.linalg.norm(got.astype(np.float32) - wanted) < 0.02 * np.linalg.norm(wanted)


# ----------------------------------------------------------------------------------------------------- draw and serve


def test_the_library_takes_the_gpu_by_itself(planned: Callable[[Layout], Path], library: Library) -> None:
    with api.load(planned("shared")) as bundle:
        assert bundle.choice.sentence == "runs in TensorRT-RTX plans"
        latents = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    assert len(library.log.runs) == len(STEP_ASSIGNMENTS)
    assert np.isfinite(latents).all()


def test_tritons_python_backend_runs_plans(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, server.__name__, server)
    backend = import_module("adatsq_trt.engines.triton_server.python_backend")
    monkeypatch.setattr(backend.server, "TritonModelException", TritonModelException, raising=False)
    files = BundleFiles.open(planned("embedded"))
    write_repository([Deployment("tiny", files)], tmp_path / "repository")
    assert "kind: KIND_AUTO" in (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text()

    bundle, parameters = backend.open_bundle(arguments(tmp_path / "repository", "tiny"))
    assert (parameters["backend"], bundle.choice.name) == ("auto", "rtx")
    assert backend.most_samples(bundle, int(parameters["max_samples"])) == 4, "the plans take 8 rows"
    batching = import_module("adatsq_trt.engines.triton_server.batching")
    batcher = batching.StepBatcher(bundle, 4)
    running = [
        batching.Generation(bundle.schedule.begin(bundle.noise([seed])), bundle.conditioning([prompt]), 2.0)
        for seed, prompt in zip(SEEDS, PROMPTS, strict=True)
    ]
    for _ in STEP_ASSIGNMENTS:
        batcher.advance(batcher.choose(running))
    got = np.concatenate([generation.latents for generation in running])
    wanted = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    assert len(library.log.runs) == 2 * len(STEP_ASSIGNMENTS)
    assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)
    bundle.close()


# ------------------------------------------------------------------------------------------------------------ doctor


def test_the_report_of_a_gpu_has_every_trial(
    planned: Callable[[Layout], Path],
    library: Library,
    compared: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = gpu_report.try_bundle(planned("embedded"), tmp_path)
    assert report.choice == "rtx"
    assert report.backends["rtx"] is None
    assert [trial.name for trial in report.trials] == ["start and draw", "start again", "check", "benchmark"]
    assert [trial.error for trial in report.trials] == [None] * 4
    assert report.passed
    assert report.trials[0].result["compile_seconds"] > 0


def test_a_failure_is_in_the_report_with_its_text(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path
) -> None:
    library.refuse.add("execute_async_v3")
    report = gpu_report.try_bundle(planned("embedded"), tmp_path)
    assert not report.passed
    assert "refuses to run" in str(report.trials[0].error)
    assert "Traceback" in str(report.trials[0].error)


def test_the_time_of_compiling_is_told(
    planned: Callable[[Layout], Path], library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "adatsq_trt"), Bundle.open(planned("embedded")) as bundle:
        bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    assert "s to start" in caplog.text
    assert "runtime-cache" in caplog.text

"""Times of whole layers: measured on the double of a GPU, and read by the search that they are for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx

from adatsq_trt.engines.backends.base import Compiler
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, PlanFile, write_manifest
from adatsq_trt.errors import UnsupportedFormatError, UserError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.search.costs import time_model
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import budget, bundle, layer_times, search
from adatsq_trt.stages.graph import run_stages
from tests.doubles.gpu import GPU
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.conftest import make_bundle
from tests.stages.tiny_run import given_policy, tiny_context

CHOICE = {"targets": ("sm120",), "formats": ("fp8", "bf16"), "format_set": "fp8,bf16", "budget_bits": None}


@pytest.fixture
def noted(book: PlanBook, monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiler | None], None]:
    """Plans of layers are known to the double, whatever compiles them."""

    def use(compiler: Compiler | None) -> None:
        def build(folder: Path, index, targets, batch, **options) -> tuple[PlanFile, ...]:
            options["compiler"] = compiler or options["compiler"]
            plans = build_plans(folder, index, targets, batch, **options)
            book.enter(BundleFiles.open(folder), plans, batch.profiles)
            return plans

        monkeypatch.setattr(layer_times, "build_plans", build)

    return use


@pytest.fixture
def with_plan(tmp_path: Path) -> BundleFiles:
    """A bundle that says it had plans for this GPU: layers are timed in plans of their own."""
    files = make_bundle(tmp_path / "run" / "bundle")
    return say_it_has_plans(files)


def say_it_has_plans(files: BundleFiles) -> BundleFiles:
    path = files.folder / "plans" / "sm120" / "assignment_000.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a plan that nobody runs")
    plan = PlanFile(target="sm120", assignment=0, path="plans/sm120/assignment_000.plan", bytes=1, max_rows=8)
    changes = {"plans": (plan,), "backend": "rtx", "versions": {"tensorrt-rtx": tensorrt_rtx.__version__}}
    write_manifest(files.folder, files.manifest.model_copy(update=changes))
    return BundleFiles.open(files.folder)


def test_every_format_of_the_target_is_timed_in_real_plans(
    with_plan: BundleFiles, library: Library, noted: Callable[[Compiler | None], None]
) -> None:
    noted(None)
    rounds: list[None] = []
    table = layer_times.measure_layers(with_plan.folder, "auto", 3, lambda: rounds.append(None))
    accelerated = {"bf16", "fp8", "fp8a16", "int4wo", "nvfp4", "nvfp4a16"}
    assert TARGETS["sm120"].formats == accelerated | {"fp16"}
    # Both layers have one shape: 6 rows of 4 tokens, 16 inputs and outputs.
    assert {(t.m, t.n, t.k) for t in table.timings} == {(24, 16, 16)}
    assert {t.what for t in table.timings} == {f"layer {name}" for name in accelerated}
    assert all(0 < t.p20_ms <= t.median_ms <= t.p80_ms for t in table.timings)
    assert (table.card, table.target, table.layout) == (GPU, "sm120", "embedded")
    assert len(rounds) == 5
    assert len(library.log.runs) == 5 * len(table.timings)


def test_a_search_runs_on_what_the_benchmark_wrote(
    tmp_path: Path, library: Library, book: PlanBook, noted: Callable[[Compiler | None], None], monkeypatch
) -> None:
    """The shapes of the table are those that the search asks for, and the policy's milliseconds are their sum."""
    noted(CompilerDouble())
    monkeypatch.setattr(bundle, "build_plans", lambda folder, *others: ())
    file = tmp_path / "layers.json"
    policy = given_policy().model_dump_json()
    with tiny_context(tmp_path / "run", **CHOICE, policy=policy) as context:
        assert run_stages(context, bundle.NAME).done
        files = say_it_has_plans(BundleFiles.open(bundle.stage(context).folder))
        write_json_model(file, layer_times.measure_layers(files.folder, "rtx", 2))
        shapes = {(shape.tokens, shape.out_features, shape.in_features) for shape in budget.shapes_of(context)}
    content = json.loads(file.read_text())
    assert {(t["m"], t["n"], t["k"]) for t in content["timings"]} == shapes

    model, text = time_model(str(file))
    model.require([FORMATS["fp8"], FORMATS["bf16"], FORMATS["fp16"]])
    assert model.source == f"measured on {GPU}"
    with pytest.raises(UnsupportedFormatError, match=r"no time for format 'w8a8', its formats are bf16, fp16, fp8, "):
        model.require([FORMATS["w8a8"]])
    with tiny_context(tmp_path / "run", **CHOICE, times=text, budget_ms=1e6) as context:
        folder = run_stages(context, search.NAME).folder
        shapes_of_search = budget.shapes_of(context)
    result = read_json_model(folder / search.RESULT, SearchResult)
    assert result.ms_source == f"measured on {GPU}"
    times = {(t["what"], t["m"], t["n"], t["k"]): t["median_ms"] for t in content["timings"]}
    for point in result.points:
        rows = [zip(formats, shapes_of_search, strict=True) for formats in point.formats]
        own = [times[f"layer {n}", s.tokens, s.out_features, s.in_features] for row in rows for n, s in row]
        assert point.costs.ms == pytest.approx(sum(own))


def test_where_no_plans_run_there_are_no_times(tmp_path: Path) -> None:
    files = make_bundle(tmp_path / "bundle")
    with pytest.raises(UserError, match="times of layers are those of plans, and the bundle runs in ONNX Runtime on"):
        layer_times.measure_layers(files.folder, "onnxruntime", 1)

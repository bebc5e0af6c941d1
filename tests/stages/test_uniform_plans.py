"""Plans in one format everywhere, made of a bundle alone: what they compute, and their place in the benchmark."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from adatsq_trt.engines.backends.selection import BackendChoice
from adatsq_trt.engines.benchmark import benchmark_bundles
from adatsq_trt.engines.bundle import BundleFiles, Layout, write_manifest
from adatsq_trt.formats import FORMATS
from adatsq_trt.stages import uniform_plans
from adatsq_trt.stages.uniform_plans import uniform_bundle
from tests.doubles.gpu import know_uniform_plans
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.gpu_runtime.conftest import add_plans
from tests.tiny_pipeline import make_flux_bundle

Built = list[Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """Steps are all in fp8, or in fp8 and bf16 in turns."""
    return make_flux_bundle(tmp_path_factory.mktemp("uniform") / "run" / "bundle", ("target", "cpu"))


@pytest.fixture
def with_plans(exported: BundleFiles, book: PlanBook, tmp_path: Path) -> Callable[..., BundleFiles]:
    """The same with plans of a layout."""

    def make(layout: Layout = "embedded", formats: tuple[str, ...] = ("bf16", "fp8")) -> BundleFiles:
        files = BundleFiles.open(shutil.copytree(exported.folder, tmp_path / "run" / "bundle"))
        write_manifest(files.folder, files.manifest.model_copy(update={"formats": formats}))
        return BundleFiles.open(add_plans(BundleFiles.open(files.folder), book, layout, compiler=CompilerDouble()))

    return make


@pytest.fixture
def built(book: PlanBook, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Plans of one format are a double's, which knows what they compute; the folders that were built, in order."""
    return know_uniform_plans(book, monkeypatch)


def chosen(files: BundleFiles) -> BackendChoice:
    return BackendChoice("rtx", files.manifest.plans)


def outputs(files: BundleFiles, assignment: int) -> np.ndarray:
    """Of the cpu graph, on seeded inputs."""
    graph, rng = files.graph("cpu", assignment), np.random.default_rng(0)
    feed = {s.name: rng.standard_normal((2, *map(int, s.shape[1:])), dtype=np.float32) for s in graph.inputs}
    feed["timestep"] = np.full(2, 0.5, np.float32)
    feed |= {s.name: np.asarray(1 / 64, np.float32) for s in graph.scale_inputs.values()}
    session = onnxruntime.InferenceSession(files.graph_path(graph), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def nodes(files: BundleFiles, assignment: int) -> list[str]:
    """Of the target graph, in no order."""
    model = onnx.load(files.graph_path(files.graph("target", assignment)), load_external_data=False)
    return sorted(f"{node.name}: {node.op_type} of {', '.join(node.input)}" for node in model.graph.node)


def test_a_format_of_which_the_bundle_has_the_graph_comes_out_as_that(
    with_plans: Callable[..., BundleFiles], library: Library, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's first assignment is fp8 everywhere: taken out and put in again, it is the same graph."""
    files = with_plans()
    monkeypatch.setattr(uniform_plans, "_formats", lambda *_: [FORMATS["bf16"], FORMATS["fp8"]])
    made = uniform_bundle(files, chosen(files), 4)
    assert made is not None
    assert [set(row) for row in made.policy.assignments] == [{"bf16"}, {"fp8"}]
    assert nodes(made, 1) == nodes(files, 0)
    # Weights are rounded from what is stored in 16 bits, where the exporter had them in float32.
    reference = outputs(files, 0)
    assert np.linalg.norm(outputs(made, 1) - reference) < 0.05 * np.linalg.norm(reference)
    assert np.linalg.norm(outputs(made, 0) - reference) > 1e-3 * np.linalg.norm(reference)


@pytest.mark.parametrize("layout", ["embedded", "shared", "switch"])
def test_the_benchmark_times_them_beside_the_policy(
    layout: Layout,
    with_plans: Callable[..., BundleFiles],
    library: Library,
    built: Built,
    book: PlanBook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compare(files: BundleFiles, target: str, rows: int) -> dict[str, bytes]:
        book.enter_comparison(files, b"a double's plan in 16 bits", rows, "bfloat16")
        return {"16 bits": b"a double's plan in 16 bits"}

    monkeypatch.setattr("adatsq_trt.engines.benchmark.build_comparison_plans", compare)
    files = with_plans(layout, ("bf16", "fp8", "nvfp4a16", "w8a8s"))
    result = benchmark_bundles([files.folder], "auto", 2, 2, uniform=uniform_bundle)
    cases = {timing.case: timing for timing in result.timings}
    # fp8 is an assignment of the policy already, and w8a8s none of the card's formats.
    assert list(cases) == ["policy", "assignment 0", "assignment 1", "uniform bf16", "uniform nvfp4a16", "16 bits"]
    layers = len(files.policy.layers)
    assert cases["uniform nvfp4a16"].formats == {"nvfp4a16": layers}
    for timing in cases.values():
        assert timing.picture_seconds == pytest.approx(files.policy.steps * timing.median_ms / 1e3)
        assert timing.speed_up_16 == pytest.approx(cases["16 bits"].median_ms / timing.median_ms)
        assert (timing.backend, timing.layout, timing.rows) == ("rtx", layout, 4)
    assert set(files.folder.parent.iterdir()) >= {files.folder.parent / uniform_plans.UNIFORM_FOLDER}

    benchmark_bundles([files.folder], "auto", 2, 1, uniform=uniform_bundle)
    assert len(built) == 1, "they are kept"
    manifest = next(files.folder.parent.glob(f"{uniform_plans.UNIFORM_FOLDER}/*/bundle/manifest.json"))
    manifest.write_text("damaged")
    benchmark_bundles([files.folder], "auto", 2, 1, uniform=uniform_bundle)
    assert len(built) == 2, "what is not whole is built again"


def test_a_bundle_that_nothing_can_be_written_beside(
    with_plans: Callable[..., BundleFiles],
    library: Library,
    built: Built,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = with_plans()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("adatsq_trt.engines.backends.rtx_steps.os.access", lambda path, mode: False)
    made = uniform_bundle(files, chosen(files), 4)
    assert made is not None
    assert made.folder.is_relative_to(tmp_path / "cache" / "adatsq-trt" / uniform_plans.UNIFORM_FOLDER)


@pytest.mark.parametrize(("changes", "told"), [({"layout": "plugin"}, "layout plugin"), ({"formats": ("fp8",)}, None)])
def test_where_there_are_none(
    changes: dict[str, object],
    told: str | None,
    with_plans: Callable[..., BundleFiles],
    library: Library,
    built: Built,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = with_plans()
    write_manifest(files.folder, files.manifest.model_copy(update=changes))
    with caplog.at_level("INFO", "adatsq_trt"):
        assert uniform_bundle(BundleFiles.open(files.folder), chosen(files), 4) is None
    assert (told or "") in caplog.text
    assert not built


@pytest.mark.slow
def test_the_real_compiler_takes_them(
    with_plans: Callable[..., BundleFiles], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = with_plans()
    made = uniform_bundle(files, chosen(files), 4)
    assert made is not None
    (plan,) = made.manifest.plans
    assert (plan.target, plan.assignment) == ("sm120", 0)
    assert plan.bytes > 10_000

"""Commands on the double of a GPU, end to end: what plans give is what the processor gives with the same casts."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from adatsq_trt.engines import benchmark, runtime
from adatsq_trt.engines.backends import tensorrt
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.selection import BackendChoice, Offload, compile_where_plans_run
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, Layout, PlanFile
from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.formats import FORMATS
from adatsq_trt.search.costs import time_model
from adatsq_trt.stages import bundle, layer_times
from adatsq_trt.stages.graph import run_stages
from tests.cli.conftest import CommandLine
from tests.doubles.gpu import know_uniform_plans
from tests.doubles.processor_with_casts import CastingSteps
from tests.doubles.tensorrt_on_onnxruntime import PLUGIN_LIBRARY, VERSION, CompilerDouble, Library, PlanBook
from tests.engines.triton_server import test_loop_model as server_doubles
from tests.engines.triton_server.test_python_backend import TritonModelException, arguments
from tests.stages.tiny_run import given_policy, tiny_context

LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch", "plugin")
STEPS = 2
STEP_MODEL = "adatsq_trt.engines.triton_server.step_model"
CHOICE = {"targets": ("sm120",), "formats": ("fp8", "bf16"), "format_set": "fp8,bf16", "weights": "free"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> dict[Layout, Path]:
    """A run of the tiny model for each layout, built by the stages with a double of the compilers."""
    folder, made = tmp_path_factory.mktemp("gpu"), dict[Layout, Path]()
    plugins = folder / "libadatsq_plugins.so"
    plugins.write_bytes(PLUGIN_LIBRARY)
    noted: list[tuple[tuple[PlanFile, ...], BatchRange]] = []
    policy = given_policy().model_dump_json()

    def build(folder: Path, index: Any, targets: Any, batch: BatchRange, *others: Any) -> tuple[PlanFile, ...]:
        on_plan, _compiler, layout, _jobs = others
        plans = build_plans(folder, index, targets, batch, on_plan, CompilerDouble(), layout)
        noted.append((plans, batch))
        return plans

    for layout in LAYOUTS:
        noted.clear()
        own = {"backend": "tensorrt", "plugins": str(plugins)} if layout == "plugin" else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundle, "build_plans", build)
            patch.setattr(tensorrt.TensorRTBackend, "version", lambda _: VERSION)
            with tiny_context(folder / "run", **CHOICE, policy=policy, layout=layout, **own) as context:
                built = run_stages(context, bundle.NAME).folder
        made[layout] = folder / layout
        shutil.copytree(built, made[layout] / "bundle")
        ((plans, batch),) = noted
        book.enter(BundleFiles.open(made[layout]), plans, batch.profiles)
    return made


@pytest.fixture
def in_place_of_plans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the processor computes what the plans would."""
    make = runtime.make_runner

    def make_here(files: BundleFiles, choice: BackendChoice, quantized: bool = True, offload: Offload = "none") -> Any:
        return CastingSteps(files) if quantized and choice.plans else make(files, choice, quantized, offload)

    return lambda: monkeypatch.setattr(runtime, "make_runner", make_here)


def test_the_runs_have_plans(runs: dict[Layout, Path]) -> None:
    manifests = {layout: BundleFiles.open(run).manifest for layout, run in runs.items()}
    assert {layout: manifest.backend for layout, manifest in manifests.items()} == {
        "embedded": "rtx",
        "shared": "rtx",
        "switch": "rtx",
        "plugin": "tensorrt",
    }
    assert manifests["plugin"].versions["tensorrt"] == VERSION
    assert all(manifest.plans for manifest in manifests.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_draws_the_processors_pictures(
    layout: Layout,
    runs: dict[Layout, Path],
    cli: CommandLine,
    library: Library,
    in_place_of_plans: Callable[[], None],
    tmp_path: Path,
) -> None:
    ended = cli("generate", runs[layout], "--samples", "2", "--output", tmp_path / "plans.png")
    assert ended.code == 0, ended.err
    assert ("runs in TensorRT plans" if layout == "plugin" else "runs in TensorRT-RTX plans") in ended.err
    assert len(library.log.runs) == STEPS
    in_place_of_plans()
    assert cli("generate", runs[layout], "--samples", "2", "--output", tmp_path / "processor.png").code == 0
    assert len(library.log.runs) == STEPS
    assert (tmp_path / "plans.png").read_bytes() == (tmp_path / "processor.png").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_compares_every_plan(
    layout: Layout, runs: dict[Layout, Path], cli: CommandLine, library: Library, tmp_path: Path
) -> None:
    ended = cli("check", runs[layout], "--json", "--output", tmp_path / "check")
    assert ended.code == 0, ended.err
    report, backend = json.loads(ended.out), "tensorrt" if layout == "plugin" else "rtx"
    of_plans = [row for row in report["rows"] if row["variant"] == "plan"]
    blocks = {row["block"] for row in of_plans if row["block"] is not None}
    assert blocks == (set(BundleFiles.open(runs[layout]).index.blocks) if layout in ("embedded", "shared") else set())
    rows = [row for row in of_plans if row["block"] is None]
    assert ([row["step"] for row in rows], {row["computed_by"] for row in rows}) == (list(range(STEPS)), {backend})
    assert report["passed"]
    assert report["plan_loop"]["passed"]
    assert report["backend"] == backend


@pytest.mark.parametrize("layout", LAYOUTS)
def test_benchmark_times_every_plan(
    layout: Layout,
    runs: dict[Layout, Path],
    cli: CommandLine,
    library: Library,
    book: PlanBook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "build_comparison_plans", lambda *_: {})
    know_uniform_plans(book, monkeypatch)
    ended = cli("benchmark", "bundle", runs[layout], "--rounds", "1", "--json")
    assert ended.code == 0, ended.err
    policy = BundleFiles.open(runs[layout]).policy
    timings = json.loads(ended.out)["timings"]
    own = ["policy", *(f"assignment {i}" for i in range(len(policy.assignments)))]
    uniform = [] if layout == "plugin" else ["uniform bf16", "uniform fp8"]
    assert [t["case"] for t in timings] == [*own, *uniform]
    alone = json.loads(cli("benchmark", "bundle", runs[layout], "--rounds", "1", "--json", "--no-uniform").out)
    assert [t["case"] for t in alone["timings"]] == own
    assert {t["backend"] for t in timings} == {"tensorrt" if layout == "plugin" else "rtx"}


def test_benchmark_writes_the_times_of_whole_layers(
    runs: dict[Layout, Path],
    cli: CommandLine,
    library: Library,
    book: PlanBook,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of layout `plugin`; tests/stages/test_layer_times.py has another, and the search that reads it."""

    def build(folder: Path, index: Any, targets: Any, batch: Any, compiler: Any, layout: Layout) -> Any:
        plans = build_plans(folder, index, targets, batch, compiler=CompilerDouble(), layout=layout)
        book.enter(BundleFiles.open(folder), plans, batch.profiles)
        return plans

    monkeypatch.setattr(layer_times, "build_plans", build)
    file = tmp_path / "layers.json"
    ended = cli("benchmark", "bundle", runs["plugin"], "--rounds", "1", "--layer-times", file)
    assert ended.code == 0, ended.err
    time_model(str(file))[0].require([FORMATS[name] for name in ("w8a8", "w4a8", "int4wo", "w8a16", "fp8", "bf16")])
    both = (runs["plugin"], runs["embedded"])
    assert "got 2 bundles, expected one" in cli("benchmark", "bundle", *both, "--layer-times", file).refusal


def test_doctor_and_build_tell_what_was_compiled(
    runs: dict[Layout, Path], cli: CommandLine, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "build_comparison_plans", lambda *_: {})
    for layout in ("shared", "embedded"):  # what other tests left
        shutil.rmtree(runs[layout] / "runtime-cache", ignore_errors=True)
    ended = cli("doctor", "--gpu", "--bundle", runs["shared"], "--output", tmp_path / "gpu.json")
    assert ended.code == 0, ended.err
    trials = json.loads((tmp_path / "gpu.json").read_text())["trials"]
    kept = runs["shared"] / "runtime-cache"
    assert [trial["result"]["known_kernels"] for trial in trials[:2]] == [False, True]
    assert {Path(trial["result"]["kernels"]).parent for trial in trials[:2]} == {kept}
    assert "compile_seconds" in ended.out
    assert str(kept) in ended.out

    files, calls = BundleFiles.open(runs["embedded"]), len(library.log.runs)
    assert "to start without kernels of an earlier run; they are kept in" in str(compile_where_plans_run(files))
    assert len(library.log.runs) == calls + len(files.policy.assignments)
    assert len(list((runs["embedded"] / "runtime-cache").iterdir())) == 1
    library.refuse.add("execute_async_v3")
    assert "the plans do not run on this machine's GPU: TensorRT-RTX" in str(compile_where_plans_run(files))


class TensorDouble:
    """What the server takes of an output."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    @classmethod
    def from_dlpack(cls, name: str, capsule: object) -> "TensorDouble":
        class Taken:
            def __dlpack__(self, **_: Any) -> object:
                return capsule

            def __dlpack_device__(self) -> tuple[int, int]:
                return 1, 0

        return cls(name, np.from_dlpack(Taken()).copy())


class StepRequestDouble:
    """A request for one call of the denoiser."""

    def __init__(self, **tensors: np.ndarray) -> None:
        self._tensors = tensors

    def parameters(self) -> str:
        return ""

    def inputs(self) -> list[Any]:
        return [server_doubles.InputDouble(name, value) for name, value in self._tensors.items()]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, str], Any]:
    """A deployed model by its module and name, in a double of the server's module."""
    server: Any = ModuleType("triton_python_backend_utils")
    server.TRITONSERVER_RESPONSE_COMPLETE_FINAL, server.TritonError = 1, server_doubles.ErrorDouble
    server.InferenceResponse, server.Tensor = server_doubles.ResponseDouble, TensorDouble
    server.MetricFamily, server.TritonModelException = server_doubles.MetricFamilyDouble, TritonModelException
    monkeypatch.setitem(sys.modules, server.__name__, server)
    for name in (*server_doubles.MODULES, STEP_MODEL):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(module: str, repository: Path, name: str) -> Any:
        model = import_module(module).TritonPythonModel()
        model.initialize(arguments(repository, name))
        return model

    return make


@pytest.fixture
def serve(load: Callable[[str, Path, str], Any]) -> Callable[[Path, str], list[np.ndarray]]:
    """Answers of a deployed loop model to two requests, and of its step model to one for each step."""

    def run(repository: Path, name: str) -> list[np.ndarray]:
        model, answers = load(server_doubles.MODULES[1], repository, name), []
        for seed in (1, 2):
            request = server_doubles.RequestDouble(prompt=[seed], seed=[seed])
            model.execute([request])
            answers.append(request.answer)
        model.finalize()
        model = load(STEP_MODEL, repository, f"{name}_step")
        with Bundle(BundleFiles.open(repository / name / "1" / "bundle"), "onnxruntime") as own:
            latents, conditioning = own.noise([1, 2]), own.conditioning([0, 1])
            for step in range(STEPS):
                inputs = own.step_inputs(step, latents, conditioning, own.manifest.guidance)
                number = np.full((len(inputs.pop(TIME_INPUT)), 1), step)
                answers += model.execute([StepRequestDouble(step=number, **inputs)])
        model.finalize()
        for answer in answers:
            assert answer.error is None, answer.error.message
        return [tensor.array for answer in answers for tensor in answer.tensors]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_deployed_model_answers_what_the_processor_would(
    layout: Layout,
    runs: dict[Layout, Path],
    cli: CommandLine,
    library: Library,
    serve: Callable[[Path, str], list[np.ndarray]],
    in_place_of_plans: Callable[[], None],
    tmp_path: Path,
) -> None:
    ended = cli("deploy", "triton", runs[layout], "--output", tmp_path / "repository", "--name", "tiny", "--step-model")
    assert ended.code == 0, ended.err
    got = serve(tmp_path / "repository", "tiny")
    assert len(library.log.runs) == 3 * STEPS
    in_place_of_plans()
    wanted = serve(tmp_path / "repository", "tiny")
    assert len(library.log.runs) == 3 * STEPS
    assert got
    for own, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(own, other)

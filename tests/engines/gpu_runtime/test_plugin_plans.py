"""Layout `plugin` in TensorRT's double: profiles select assignments, and the bundle brings the library."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.engines import accuracy
from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.backends.plan_controls import PlanControls
from adatsq_trt.engines.bundle import PLUGIN_LIBRARY, BundleFiles, write_manifest
from adatsq_trt.engines.manifest import Manifest
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import AdatsqError, DamagedFileError, UserError
from tests.doubles.processor_with_casts import CastingSteps
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.gpu_runtime.conftest import add_plans
from tests.tiny_pipeline import make_flux_bundle, make_sized_bundle

SEEDS, PROMPTS = [1, 2], [0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> Path:
    files = make_flux_bundle(tmp_path_factory.mktemp("plugin") / "run" / "bundle", layout="plugin")
    return add_plans(files, book, "plugin", backend="tensorrt", compiler=CompilerDouble())


def loop(bundle: Bundle) -> np.ndarray:
    latents: np.ndarray = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    return latents


def wanted(files: BundleFiles) -> np.ndarray:
    """From the processor, with the plan's types."""
    bundle = Bundle(files, "onnxruntime")
    bundle._runners[True] = CastingSteps(files)
    return loop(bundle)


def test_the_plan_is_chosen_by_itself(folder: Path, library: Library) -> None:
    with Bundle.open(folder) as bundle:
        assert bundle.choice.name == "tensorrt"
        assert bundle.choice.passed_over[0][1].startswith("the bundle's plans are of tensorrt, not of TensorRT-RTX")
        assert bundle.most_rows() == 8
        loop(bundle)
    assert library.loaded == str(folder / PLUGIN_LIBRARY)
    assert set(library.log.runs) == {"plugin.cpu.onnx"}


def test_a_second_bundle_finds_the_library_loaded(folder: Path, library: Library) -> None:
    with Bundle.open(folder) as first, Bundle.open(folder) as second:
        np.testing.assert_array_equal(loop(first), loop(second))


def test_streamed_weights_have_their_budget_before_memory_is_asked_for(folder: Path, library: Library) -> None:
    with Bundle.open(folder) as bundle:
        expected = loop(bundle)
    library.streamable_bytes = 1 << 20
    with Bundle.open(folder) as bundle:
        np.testing.assert_array_equal(loop(bundle), expected)


def test_a_library_that_does_not_load_is_told(folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.doubles.tensorrt_on_onnxruntime.PLUGIN_LIBRARY", b"another")
    with (
        Bundle.open(folder) as bundle,
        pytest.raises(UserError, match=r"cannot load the plugin library '.*plugins\.so"),
    ):
        loop(bundle)


def test_check_compares_the_plan_at_every_step(folder: Path, library: Library, tmp_path: Path) -> None:
    """Its rows alone: the tiny bundle has no reference of PyTorch's."""
    with Bundle.open(folder) as plans, Bundle.open(folder, "onnxruntime") as graphs:
        for step in range(plans.policy.steps):
            inputs = plans.step_inputs(step, plans.noise(SEEDS), plans.conditioning(PROMPTS), 2.0)
            got, near = plans.predict(step, inputs), graphs.predict(step, inputs)
            limit = accuracy.rows.plan_output_tolerance(plans.files, step).relative
            assert np.linalg.norm(got - near) <= limit * np.linalg.norm(near)


def previous_assignment(patch: pytest.MonkeyPatch) -> None:
    """The selector of the step before."""
    bind = PlanControls.bind_step
    patch.setattr(
        PlanControls, "bind_step", lambda self, context, step, size: bind(self, context, max(step - 1, 0), size)
    )


def first_profile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Manifest, "profiles_of", lambda self, shape, assignment=0: range(1))


def no_selector(patch: pytest.MonkeyPatch) -> None:
    shape = EngineContext.set_shape
    patch.setattr(
        EngineContext,
        "set_shape",
        lambda self, name, size: None if len(size) == 2 and size[0] == 1 else shape(self, name, size),
    )


@pytest.mark.parametrize("fault", [previous_assignment, first_profile, no_selector])
def test_a_fault_of_the_runtime_is_caught(
    folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch, fault
) -> None:
    expected = wanted(BundleFiles.open(folder))
    fault(monkeypatch)
    with Bundle.open(folder) as bundle:
        try:
            got = loop(bundle)
        except (AssertionError, AdatsqError):
            return
        assert not np.array_equal(got, expected)


def test_a_plan_without_a_profile_for_every_assignment_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "bundle")
    manifest = BundleFiles.open(copy).manifest
    (plan,) = manifest.plans
    short = plan.model_copy(update={"profile_rows": plan.profile_rows[:1]})
    write_manifest(copy, manifest.model_copy(update={"plans": (short,)}))
    with pytest.raises(DamagedFileError, match="has 1 optimization profiles, expected 2, 1 for each assignment"):
        BundleFiles.open(copy)


def test_every_assignment_has_all_sizes(tmp_path: Path, library: Library, book: PlanBook) -> None:
    bundle = make_sized_bundle(tmp_path / "bundle", (2, 8), layout="plugin")
    graph = bundle.graph("target", None)
    grows = next(s.name for s in graph.inputs if any(isinstance(n, str) for n in s.shape[1:]))
    profiles = []
    for shape in bundle.manifest.shapes:
        shapes = {name: value.shape for name, value in bundle.positions(graph, shape.size).items()}
        shapes[grows] = (0, *shape.latent_shape)
        profiles += [Profile(1, 2 * samples, 2 * samples, tuple(shapes.items())) for samples in shape.batches]
    files = BundleFiles.open(bundle.folder)
    add_plans(files, book, "plugin", BatchRange.of_sizes(profiles), "tensorrt", CompilerDouble())
    files = BundleFiles.open(bundle.folder)
    with Bundle(files) as opened:
        other = Bundle(files, "onnxruntime")
        other._runners[True] = CastingSteps(files)
        for size in opened.sizes:
            noise, condition = opened.noise(SEEDS, size), opened.conditioning(PROMPTS)
            got = opened.denoise(noise, condition, size=size)
            np.testing.assert_array_equal(got, other.denoise(noise, condition, size=size))

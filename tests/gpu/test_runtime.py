"""Bundles on the GPU that is there: the same that the doubles of tests/engines/gpu_runtime stand for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.engines import gpu_report
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.cuda_device import gpu_is_here
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import Layout, write_manifest
from adatsq_trt.engines.runtime import Bundle, StepResult
from adatsq_trt.formats import TARGETS, Target
from tests.engines.conftest import make_bundle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_is_here(), reason="there is no NVIDIA driver with a GPU"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]
SEEDS, PROMPTS = [5, 6, 7], [0, 1, 2]
LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch")


def target_here() -> Target:
    """The target of this GPU; skips where TensorRT-RTX compiles for none such."""
    major, minor = torch.cuda.get_device_capability()
    for target in TARGETS.values():
        if target.compute_capability == 10 * major + minor and target.formats:
            return target
    pytest.skip(f"TensorRT-RTX compiles no plans for sm{major}{minor}")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """Folder of the tiny bundle with plans for this GPU; made once."""
    made: dict[Layout, Path] = {}

    def make(layout: Layout) -> Path:
        if layout not in made:
            bundle, target = make_bundle(tmp_path_factory.mktemp(layout) / "run" / "bundle"), target_here()
            batch = BatchRange(1, 8, 8, smaller=(2,))
            plans = build_plans(bundle.folder, bundle.index, [target], batch, layout=layout)
            changes = {"plans": plans, "layout": layout, "versions": {"tensorrt-rtx": RtxBackend().version()}}
            write_manifest(bundle.folder, bundle.manifest.model_copy(update=changes))
            made[layout] = bundle.folder
        return made[layout]

    return make


@contextmanager
def without_waiting() -> Iterator[None]:
    """PyTorch raises where it would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loop(bundle: Bundle) -> np.ndarray:
    return bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_are_near_the_processor(planned: Callable[[Layout], Path], layout: Layout) -> None:
    folder = planned(layout)
    with Bundle.open(folder) as bundle, Bundle.open(folder, "onnxruntime") as other:
        assert bundle.choice.name == "rtx", bundle.choice.sentence
        got, wanted = loop(bundle), loop(other)
        np.testing.assert_array_equal(loop(bundle), got)
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_after_the_first_step(planned: Callable[[Layout], Path], layout: Layout) -> None:
    with Bundle.open(planned(layout)) as bundle:
        latents = torch.from_numpy(bundle.noise(SEEDS)).to(bundle.device)
        condition = bundle.conditioning(PROMPTS)
        bundle.denoise(latents, condition)  # kernels are compiled here

        def forbid(told: StepResult) -> None:
            torch.cuda.set_sync_debug_mode("error" if told.step < told.steps - 1 else "default")

        try:
            result = bundle.denoise(latents, condition, callback=forbid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.device == latents.device
    assert result.isfinite().all()


def test_a_planted_wait_is_caught() -> None:
    with without_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def test_onnxruntime_on_the_gpu_is_near_the_processor(planned: Callable[[Layout], Path]) -> None:
    folder = planned("embedded")
    with Bundle.open(folder, "cuda") as bundle, Bundle.open(folder, "onnxruntime") as other:
        got, wanted = loop(bundle), loop(other)
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_every_trial_of_the_report_goes_well(planned: Callable[[Layout], Path], tmp_path: Path) -> None:
    report = gpu_report.try_bundle(planned("embedded"), tmp_path)
    assert report.choice == "rtx"
    assert [trial.error for trial in report.trials] == [None] * 4

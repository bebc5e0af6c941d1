"""After `close` every call is refused with one sentence, on the double of a GPU and on the processor."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.engines.backends import selection
from adatsq_trt.engines.backends.device_steps import DeviceSteps, RowBuffers
from adatsq_trt.engines.backends.selection import BackendName
from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import UserError
from tests.doubles.host_device import HostDevice
from tests.doubles.tensorrt_on_onnxruntime import Library
from tests.engines.conftest import GUIDANCE
from tests.engines.gpu_runtime.test_onnxruntime_gpu import OnHostDevice
from tests.tiny_pipeline import make_flux_bundle

SEEDS, PROMPTS = [5, 6], [0, 1]


@contextmanager
def refused(bundle: Bundle) -> Iterator[None]:
    with pytest.raises(UserError) as error:
        yield
    folder = bundle.files.folder
    assert str(error.value) == f"bundle '{folder}' is closed and its memory given back; open it again with Bundle.open"


@pytest.fixture(params=["rtx", "cuda", "onnxruntime"])
def bundle(
    request: pytest.FixtureRequest,
    planned: Callable[[Layout], Path],
    library: Library,
    device: HostDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> Bundle:
    monkeypatch.setattr(selection, "OnnxRuntimeGpuSteps", lambda files, graph: OnHostDevice(files, graph, device))
    monkeypatch.setattr(selection, "require_cuda", lambda: None)
    backend: BackendName = request.param
    return Bundle.open(planned("shared"), backend)


@pytest.mark.parametrize("used", [False, True])
def test_a_bundle(bundle: Bundle, used: bool) -> None:
    noise, condition = bundle.noise(SEEDS), bundle.conditioning(PROMPTS)
    inputs = bundle.step_inputs(1, noise, condition, GUIDANCE)
    if used:
        bundle.denoise(noise, condition)
    bundle.close()
    bundle.close()  # a second time does nothing
    calls: list[Callable[[], object]] = [
        lambda: bundle.denoise(noise, condition),
        lambda: bundle.denoise(noise, condition, quantized=False),
        lambda: bundle.predict(1, inputs),
        lambda: bundle.decode(noise),
        bundle.runner,
        bundle.__enter__,
    ]
    for call in calls:
        with refused(bundle):
            call()
    assert bundle.policy.steps == len(bundle.schedule.timesteps), "its files can still be asked"


def test_a_runner_and_a_loop_that_had_begun(bundle: Bundle) -> None:
    request = bundle.request(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    runner = bundle.runner()
    loop = runner.loop(request)
    steps = loop.run()
    next(steps)
    bundle.close()
    inputs = bundle.step_inputs(0, bundle.noise(SEEDS), bundle.conditioning(PROMPTS), GUIDANCE)
    calls: list[Callable[[], object]] = [
        lambda: next(steps),
        lambda: next(loop.run()),
        lambda: runner.run(0, inputs),
        lambda: runner.loop(request),
    ]
    for call in calls:
        with refused(bundle):
            call()


def test_a_loop_whose_callback_closes(bundle: Bundle) -> None:
    done: list[int] = []

    def close(told: object) -> None:
        done.append(1)
        bundle.close()

    with refused(bundle):
        bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS), callback=close)
    assert done == [1]


def test_a_step_of_a_plan_and_its_memory(
    planned: Callable[[Layout], Path], library: Library, device: HostDevice
) -> None:
    bundle = Bundle.open(planned("shared"), "rtx")
    runner = bundle.runner()
    assert isinstance(runner, DeviceSteps)
    buffers = RowBuffers(runner, 2, None)
    runner.enqueue(0, buffers)
    waited = device.synchronizations
    bundle.close()
    assert device.synchronizations == waited + 1, "what was enqueued uses the memory that is given back"
    with refused(bundle):
        runner.enqueue(0, buffers)
    del buffers
    gc.collect()  # the error's traceback knows them
    assert device.used_bytes() == 0


def test_the_wrapper(tmp_path: Path) -> None:
    bundle = Bundle(make_flux_bundle(tmp_path / "bundle"))
    transformer = AdatsqTransformer.from_bundle(bundle)
    condition = {name: torch.from_numpy(value) for name, value in bundle.conditioning([0]).conditional.items()}
    rows, columns = torch.meshgrid(*map(torch.arange, bundle.manifest.image.shape.grid), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    time = torch.full((1,), bundle.schedule.model_time(0))
    given = {**condition, "timestep": time, "img_ids": positions, "txt_ids": torch.zeros(8, 3)}
    latents = torch.from_numpy(bundle.noise([1]))
    assert np.isfinite(transformer(latents, **given).sample.numpy()).all()
    bundle.close()
    with refused(bundle):
        transformer(latents, **given)


def test_files_that_are_opened_again_run(tiny_bundle: BundleFiles) -> None:
    first = Bundle(tiny_bundle)
    wanted = first.denoise(first.noise(SEEDS), first.conditioning(PROMPTS))
    first.close()
    with Bundle(tiny_bundle) as second:
        np.testing.assert_array_equal(second.denoise(second.noise(SEEDS), second.conditioning(PROMPTS)), wanted)

"""The loop on the double of a GPU: the processor's numbers with the target's casts, and nothing crosses the border."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adatsq_trt.engines.backends import device_steps, plan_controls
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.bundle import POLICY_NAME, SCALES_NAME, BundleFiles, Layout, write_manifest
from adatsq_trt.engines.runtime import Bundle, StepResult
from adatsq_trt.errors import AdatsqError, DamagedFileError
from tests.doubles.host_device import HostDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import Library
from tests.engines.conftest import GUIDANCE, SIGMAS, STEP_ASSIGNMENTS, WIDTH
from tests.engines.gpu_runtime.conftest import BATCH, LAYOUTS

SEEDS, PROMPTS = [5, 6, 7], [0, 1, 2]


def expected(bundle: Bundle, guided: bool = True) -> np.ndarray:
    """The loop written down once more, on the processor, with bfloat16 at the borders of the model."""
    x = torch.from_numpy(bundle.noise(SEEDS))
    stored = bundle.files.prompts
    pooled = [stored["conditional.pooled"][PROMPTS], np.repeat(stored["unconditional.pooled"], len(SEEDS), axis=0)]
    condition = torch.from_numpy(np.concatenate(pooled[: 1 + guided])).bfloat16().float().numpy()
    for step, assignment in enumerate(STEP_ASSIGNMENTS):
        graph = bundle.files.graph("cpu", None if bundle.manifest.layout == "switch" else assignment)
        rows = torch.cat([x] * (1 + guided)).bfloat16().float().numpy()
        time = torch.full((len(rows),), SIGMAS[step]).bfloat16().float().numpy()
        controls = {
            name: torch.from_numpy(value).bfloat16().float().numpy() if value.dtype == np.float32 else value
            for name, value in bundle.files.controls(graph, step).items()
        }
        feed = {"hidden_states": rows, "pooled": condition, "timestep": time, **controls}
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(bundle.files.graph_path(graph), options)
        prediction = torch.from_numpy(session.run(None, feed)[0]).bfloat16().float()
        velocity = prediction
        if guided:
            with_prompt, without = prediction[: len(SEEDS)], prediction[len(SEEDS) :]
            velocity = without + GUIDANCE * (with_prompt - without)
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * velocity
    return x.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_processors_numbers_bit_for_bit(
    planned: Callable[[Layout], Path], library: Library, layout: Layout
) -> None:
    with Bundle.open(planned(layout), "rtx") as bundle:
        got = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
    np.testing.assert_array_equal(got, expected(bundle))
    graphs = (
        ["switch.cpu.onnx"] * 4 if layout == "switch" else [f"assignment_{i:03d}.cpu.onnx" for i in STEP_ASSIGNMENTS]
    )
    assert library.log.runs == graphs


def test_without_guidance_there_is_one_branch(planned: Callable[[Layout], Path], library: Library) -> None:
    with Bundle.open(planned("shared"), "rtx") as bundle:
        both = bundle.conditioning(PROMPTS)
        got = bundle.denoise(bundle.noise(SEEDS), type(both)(both.conditional))
    np.testing.assert_array_equal(got, expected(bundle, guided=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_crosses_the_border_between_steps(
    planned: Callable[[Layout], Path], library: Library, device: HostDevice, layout: Layout
) -> None:
    crossed: list[tuple[int, int]] = []
    with Bundle.open(planned(layout), "rtx") as bundle, Transfers() as transfers:

        def note(_: StepResult) -> None:
            crossed.append((transfers.to_device, transfers.to_host))

        latents = there(device, bundle.noise(SEEDS))
        result = bundle.denoise(latents, bundle.conditioning(PROMPTS), callback=note)
        assert crossed[0] == crossed[-1], "bytes crossed after the first step"
        assert crossed[-1][1] == 0
        assert device.synchronizations == 1
    assert result.device == device.device
    np.testing.assert_array_equal(result.content.numpy(), expected(bundle))


def there(device: HostDevice, value: np.ndarray) -> torch.Tensor:
    tensor = device.empty(value.shape, torch.float32)
    return tensor.copy_(torch.from_numpy(value))


def test_a_planted_transfer_is_counted(planned: Callable[[Layout], Path], library: Library, device: HostDevice) -> None:
    with Bundle.open(planned("embedded"), "rtx") as bundle, Transfers() as transfers:
        latents = there(device, bundle.noise(SEEDS))
        before = transfers.to_host
        bundle.denoise(latents, bundle.conditioning(PROMPTS), callback=lambda told: told.latents.cpu())
    assert transfers.to_host - before == 4 * latents.numel() * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_calls_with_changing_rows(planned: Callable[[Layout], Path], library: Library, layout: Layout) -> None:
    with Bundle.open(planned(layout), "rtx") as bundle, Bundle.open(planned(layout), "onnxruntime") as other:
        for samples in (1, 4, 2):
            latents, conditioning = bundle.noise(range(samples)), bundle.conditioning([0] * samples)
            inputs = bundle.step_inputs(1, latents, conditioning, GUIDANCE)
            got = bundle.predict(1, inputs)
            assert isinstance(got, np.ndarray)
            near = other.predict(1, inputs)
            assert np.linalg.norm(got - near) < 0.05 * np.linalg.norm(near)


def test_two_generations_do_not_share_buffers(planned: Callable[[Layout], Path], library: Library) -> None:
    with Bundle.open(planned("shared"), "rtx") as bundle:
        alone = [bundle.denoise(bundle.noise([seed]), bundle.conditioning([0])) for seed in (1, 2)]
        others: list[np.ndarray] = []

        def between(told: StepResult) -> None:
            if told.step == 1:
                others.append(bundle.denoise(bundle.noise([2]), bundle.conditioning([0])))

        first = bundle.denoise(bundle.noise([1]), bundle.conditioning([0]), callback=between)
    np.testing.assert_array_equal(first, alone[0])
    np.testing.assert_array_equal(others[0], alone[1])


def test_only_what_can_be_captured_is(planned: Callable[[Layout], Path], library: Library) -> None:
    for layout in ("embedded", "switch"):
        with Bundle.open(planned(layout), "rtx") as bundle:
            bundle.denoise(bundle.noise([1]), bundle.conditioning([0]))
    assert library.log.captured == [True] * 3 + [False]


def test_compiled_kernels_are_kept_before_the_end(planned: Callable[[Layout], Path], library: Library) -> None:
    folder = planned("embedded")
    first = Bundle.open(folder, "rtx")
    first.denoise(first.noise([1]), first.conditioning([0]))
    cache = folder.parent / "runtime-cache"
    kept = [file.read_bytes() for file in cache.iterdir()]
    assert kept == [b"kernels of 4 runs"]
    with Bundle.open(folder, "rtx") as second:
        second.denoise(second.noise([1]), second.conditioning([0]))
    assert library.log.cached[-1:] == kept


@pytest.mark.parametrize(
    "method",
    [
        "create_execution_context",
        "execute_async_v3",
        "set_input_shape",
        "set_tensor_address",
        "set_optimization_profile_async",
    ],
)
def test_a_refusal_of_the_library_is_told(planned: Callable[[Layout], Path], library: Library, method: str) -> None:
    library.refuse.add(method)
    with Bundle.open(planned("embedded"), "rtx") as bundle, pytest.raises(AdatsqError, match=r"\.plan.*refuses to"):
        bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))


def test_a_cache_that_is_not_taken_costs_only_time(
    planned: Callable[[Layout], Path], library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuse.add("set_runtime_cache")
    with Bundle.open(planned("embedded"), "rtx") as bundle:
        assert np.isfinite(bundle.denoise(bundle.noise([1]), bundle.conditioning([0]))).all()
    assert "it compiles kernels at every start" in caplog.text


def test_buffers_do_not_grow_with_every_number_of_rows(
    planned: Callable[[Layout], Path], library: Library, device: HostDevice
) -> None:
    used = []
    with Bundle.open(planned("shared"), "rtx") as bundle:
        for samples in (4, 1, 2, 3, 4):
            inputs = bundle.step_inputs(0, bundle.noise(range(samples)), bundle.conditioning([0] * samples), GUIDANCE)
            bundle.predict(0, inputs)
            used.append(device.used_bytes())
    assert used[-1] == used[0] == max(used)


def test_28_steps_wait_once_and_move_nothing(
    planned: Callable[[Layout], Path], library: Library, device: HostDevice, tmp_path: Path
) -> None:
    folder = seven_times_as_long(planned("shared"), tmp_path / "bundle")
    library.book.enter(BundleFiles.open(folder), BundleFiles.open(folder).manifest.plans, BATCH.profiles)
    crossed: list[tuple[int, int]] = []
    with Bundle.open(folder, "rtx") as bundle, Transfers() as transfers:
        latents = there(device, bundle.noise(SEEDS))
        bundle.denoise(
            latents,
            bundle.conditioning(PROMPTS),
            callback=lambda _: crossed.append((transfers.to_device, transfers.to_host)),
        )
        assert device.synchronizations == 1
    assert len(crossed) == len(library.log.runs) == 28
    assert len(set(crossed)) == 1
    assert crossed[0][1] == 0


def seven_times_as_long(folder: Path, copy: Path) -> Path:
    """The bundle with its steps' assignments and scales again and again."""
    shutil.copytree(folder, copy)
    files, sigmas = BundleFiles.open(copy), tuple(np.linspace(1, 0, 29).tolist())
    files.policy.model_copy(update={"steps": 28, "step_assignments": 7 * files.policy.step_assignments}).save(
        copy / POLICY_NAME
    )
    save_file({name: np.tile(t, (7, 1)) for name, t in load_file(copy / SCALES_NAME).items()}, copy / SCALES_NAME)
    schedule = files.manifest.schedule.model_copy(update={"sigmas": sigmas, "timesteps": sigmas[:-1]})
    write_manifest(copy, files.manifest.model_copy(update={"schedule": schedule}))
    return copy


def test_a_plan_that_does_not_load_is_told(
    planned: Callable[[Layout], Path], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.book, "find", lambda _: None)
    with Bundle.open(planned("embedded"), "rtx") as bundle, pytest.raises(DamagedFileError, match="cannot load"):
        bundle.denoise(bundle.noise([1]), bundle.conditioning([0]))


# ------------------------------------------------------------------------------------ faults of the runtime are caught


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    bind = plan_controls._StepTable.bind
    patch.setattr(plan_controls._StepTable, "bind", lambda self, context, step: bind(self, context, max(step - 1, 0)))


def swapped_inputs(patch: pytest.MonkeyPatch) -> None:
    bind = EngineContext.bind

    def swap(self: EngineContext, name: str, address: int) -> None:
        bind(self, {"pooled": "hidden_states", "hidden_states": "pooled"}.get(name, name), address)

    patch.setattr(EngineContext, "bind", swap)


def no_profile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineContext, "use_profile", lambda self, index, stream: None)


def no_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan_controls.PlanControls, "bind_weights", lambda self, context: None)


def weights_of_another(patch: pytest.MonkeyPatch) -> None:
    load = plan_controls.load_store

    def turned(path: Path, memory: plan_controls.Memory, names: Any) -> dict[str, torch.Tensor]:
        store = load(path, memory, names)
        first, second = [name for name, value in store.items() if len(value) == WIDTH * WIDTH][:2]
        return {**store, first: store[second]}

    patch.setattr(plan_controls, "load_store", turned)


def stale_latents(patch: pytest.MonkeyPatch) -> None:
    predict = device_steps.DeviceLoop.predict
    patch.setattr(
        device_steps.DeviceLoop,
        "predict",
        lambda self, latents, step: predict(self, self.request.latents, step),
    )


def buffers_that_are_gone(patch: pytest.MonkeyPatch) -> None:
    original = device_steps.RowBuffers.__init__

    def forget(self: device_steps.RowBuffers, *args: Any) -> None:
        original(self, *args)
        self.rows = {name: _Gone(tensor) for name, tensor in self.rows.items()}  # type: ignore[misc]

    patch.setattr(device_steps.RowBuffers, "__init__", forget)


class _Gone:
    """A tensor whose memory is given back at once, of which the address is still used."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address, self.shape = tensor.data_ptr(), tensor.shape

    def __getitem__(self, rows: slice) -> "_Gone":
        return self

    def copy_(self, value: torch.Tensor) -> None:
        pass

    def fill_(self, value: float) -> None:
        pass

    def data_ptr(self) -> int:
        return self._address


@pytest.mark.parametrize(
    "fault",
    [
        wrong_scale,
        swapped_inputs,
        no_profile,
        no_weights,
        weights_of_another,
        stale_latents,
        buffers_that_are_gone,
    ],
)
def test_a_fault_of_the_runtime_is_caught(
    planned: Callable[[Layout], Path],
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    with Bundle.open(planned("shared"), "rtx") as bundle:
        try:
            got = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS))
        except (AssertionError, AdatsqError, RuntimeError):
            return
        assert not np.array_equal(got, expected(bundle)), f"nobody noticed {fault.__name__}"

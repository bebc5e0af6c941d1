"""ONNX Runtime on bound addresses: its processor provider computes on the double's memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.engines.backends import selection
from adatsq_trt.engines.backends.onnxruntime import PROVIDER
from adatsq_trt.engines.backends.onnxruntime_gpu import OnnxRuntimeGpuSteps
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.graph_index import GraphFile
from tests.doubles.host_device import HostDevice, Transfers

SEEDS, PROMPTS = [5, 6, 7], [0, 1, 2]


class OnHostDevice(OnnxRuntimeGpuSteps):
    """The same, but for the provider."""

    memory = "cpu"

    def providers(self) -> list[str]:
        return [PROVIDER]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice()

    def make(files: BundleFiles, graph: GraphFile) -> OnHostDevice:
        return OnHostDevice(files, graph, device)

    monkeypatch.setattr(selection, "OnnxRuntimeGpuSteps", make)
    monkeypatch.setattr(selection, "require_cuda", lambda: None)
    return device


@pytest.mark.parametrize("quantized", [True, False])
def test_the_processors_loop_bit_for_bit(tiny_bundle: BundleFiles, device: HostDevice, quantized: bool) -> None:
    with Bundle.open(tiny_bundle.folder, "cuda") as bundle, Bundle.open(tiny_bundle.folder, "onnxruntime") as other:
        noise, condition = bundle.noise(SEEDS), bundle.conditioning(PROMPTS)
        got = bundle.denoise(noise, condition, quantized=quantized)
        assert device.synchronizations == 1
        np.testing.assert_array_equal(got, other.denoise(noise, condition, quantized=quantized))


def test_nothing_crosses_the_border_between_steps(tiny_bundle: BundleFiles, device: HostDevice) -> None:
    crossed: list[tuple[int, int]] = []
    with Bundle.open(tiny_bundle.folder, "cuda") as bundle, Transfers() as transfers:
        latents = device.empty((3, *bundle.manifest.latent_shape), torch.float32)
        latents.copy_(torch.from_numpy(bundle.noise(SEEDS)))
        condition = bundle.conditioning(PROMPTS)
        bundle.denoise(latents, condition, callback=lambda _: crossed.append((transfers.to_device, transfers.to_host)))
    assert len(set(crossed)) == 1
    assert crossed[0][1] == 0


def test_a_prediction_outlives_the_next_call(tiny_bundle: BundleFiles, device: HostDevice) -> None:
    """The graphs' output is float32 already, so taking it as float32 copied nothing."""
    with Bundle.open(tiny_bundle.folder, "cuda") as bundle:
        condition, kept = bundle.conditioning([0]), []
        for seed in (1, 2):
            inputs = bundle.step_inputs(0, bundle.noise([seed]), condition, 2.0)
            there = {n: device.empty(v.shape, torch.float32).copy_(torch.from_numpy(v)) for n, v in inputs.items()}
            kept.append(bundle.predict(0, there))
            if seed == 1:
                before = kept[0].content.clone()
        assert torch.equal(kept[0].content, before)
        assert not torch.equal(kept[0].content, kept[1].content)


def test_graphs_that_do_not_load_are_told(own_bundle: BundleFiles, device: HostDevice) -> None:
    path: Path = own_bundle.graph_path(own_bundle.graph("cpu", None))
    path.write_bytes(b"no graph")
    with pytest.raises(selection.UserError, match=r"ONNX Runtime .* cannot load"):
        OnHostDevice(own_bundle, own_bundle.graph("cpu", None), device)

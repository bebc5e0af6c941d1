"""A machine with a GPU of sm120, as far as anyone asks: doubles of its memory and of the libraries that run plans."""

import pytest
import torch

from adatsq_trt.engines import benchmark
from adatsq_trt.engines.backends import cuda_device, device_steps, network, rtx_steps, selection, tensorrt_steps
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend
from adatsq_trt.engines.runtime import Bundle
from tests.doubles.host_device import HostDevice
from tests.doubles.tensorrt_on_onnxruntime import VERSION, Library, PlanBook

CPU, GPU = torch.device("cpu"), "a double of a GPU"


@pytest.fixture(scope="session")
def book() -> PlanBook:
    return PlanBook()


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def library(book: PlanBook, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The double in the place of TensorRT-RTX and TensorRT, on a machine with a GPU of sm120 as far as anyone asks."""
    double = Library(book, device)
    monkeypatch.setattr(network.NetworkCompiler, "library", double)
    monkeypatch.setattr(device_steps, "CudaDevice", lambda: device)
    for module in (rtx_steps, tensorrt_steps, cuda_device):
        monkeypatch.setattr(module, "gpu_capability", lambda: 120)
    monkeypatch.setattr(TensorRTBackend, "version", lambda _: VERSION)
    monkeypatch.setattr(TensorRTBackend, "_here", staticmethod(lambda: 120))
    for module in (rtx_steps, benchmark):
        monkeypatch.setattr(module, "gpu_name", lambda: GPU)
    monkeypatch.setattr(selection, "gpu_is_here", lambda: True)
    monkeypatch.setattr(
        Bundle, "device", property(lambda self: CPU if self.choice.name == "onnxruntime" else device.device)
    )
    return double

"""A machine with a GPU of sm120, as far as anyone asks: doubles of its memory and of the libraries that run plans."""

from functools import partial

import pytest
import torch

from adatsq_trt.engines import benchmark
from adatsq_trt.engines.accuracy import marked_plans
from adatsq_trt.engines.accuracy.blocks import BlockPair
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
    monkeypatch.setattr(marked_plans, "build_marked_plan", partial(make_marked_plan, book))
    monkeypatch.setattr(
        Bundle, "device", property(lambda self: CPU if self.choice.name == "onnxruntime" else device.device)
    )
    return double


def make_marked_plan(book: PlanBook, pair: BlockPair, names: tuple[str, ...], target: str, rows: int) -> bytes:
    """A plan that the double knows, without the time that the compiler takes for one."""
    plan = f"a double's plan: {pair.bundle.folder}, {pair.assignment}, {names}, {target}, {rows}".encode()
    book.enter_marked(pair.bundle, plan, pair.assignment, pair.declared(names), rows)
    return plan

"""Bundles with real plans, run by the runtime of GPUs on a double of the library and of the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx
import torch

from adatsq_trt.engines.backends import cuda_device, device_steps, network, rtx_steps, selection
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, Layout, write_manifest
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.formats import TARGETS
from tests.doubles.host_device import HostDevice
from tests.doubles.tensorrt_on_onnxruntime import Library, PlanBook
from tests.engines.conftest import make_bundle

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch")
BATCH = BatchRange(1, 8, 8, smaller=(2,))


@pytest.fixture(scope="session")
def book() -> PlanBook:
    return PlanBook()


def add_plans(bundle: BundleFiles, book: PlanBook, layout: Layout = "embedded", batch: BatchRange = BATCH) -> Path:
    """Compile a bundle's plans with the real compiler, and note what they compute; the bundle's folder."""
    plans = build_plans(bundle.folder, bundle.index, [TARGETS["sm120"]], batch, layout=layout)
    versions = {"tensorrt-rtx": tensorrt_rtx.__version__}
    changes = {"plans": plans, "layout": layout, "versions": versions, "backend": "rtx"}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update=changes))
    book.enter(BundleFiles.open(bundle.folder), plans, batch.profiles)
    return bundle.folder


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> Callable[[Layout], Path]:
    """Folder of the tiny bundle with plans of a layout; made once."""
    made: dict[Layout, Path] = {}

    def make(layout: Layout) -> Path:
        if layout not in made:
            made[layout] = add_plans(make_bundle(tmp_path_factory.mktemp(layout) / "run" / "bundle"), book, layout)
        return made[layout]

    return make


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def library(book: PlanBook, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The double in the place of TensorRT-RTX, on a machine with a GPU of sm120 as far as anyone asks."""
    double = Library(book, device)
    monkeypatch.setattr(network.NetworkCompiler, "library", double)
    monkeypatch.setattr(device_steps, "CudaDevice", lambda: device)
    for module in (rtx_steps, cuda_device):
        monkeypatch.setattr(module, "gpu_capability", lambda: 120)
    monkeypatch.setattr(rtx_steps, "gpu_name", lambda: "a double of a GPU")
    monkeypatch.setattr(selection, "gpu_is_here", lambda: True)
    monkeypatch.setattr(
        Bundle, "device", property(lambda self: CPU if self.choice.name == "onnxruntime" else device.device)
    )
    return double

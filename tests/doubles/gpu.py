"""A machine with a GPU of sm120, as far as anyone asks: doubles of its memory and of the libraries that run plans."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adatsq_trt.engines import benchmark
from adatsq_trt.engines.accuracy import marked_plans
from adatsq_trt.engines.accuracy.blocks import BlockPair
from adatsq_trt.engines.backends import cuda_device, device_steps, network, rtx_steps, selection, tensorrt_steps
from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile, write_manifest
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.stages import uniform_plans
from tests.doubles.host_device import HostDevice
from tests.doubles.tensorrt_on_onnxruntime import VERSION, CompilerDouble, Library, PlanBook

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


def know_uniform_plans(book: PlanBook, patch: pytest.MonkeyPatch) -> list[Path]:
    """Let plans in one format everywhere be a double's, which knows what they compute; the folders that are built."""
    folders: list[Path] = []

    def build(folder: Path, index: Any, targets: Any, batch: BatchRange, **options: Any) -> tuple[PlanFile, ...]:
        plans = build_plans(folder, index, targets, batch, **{**options, "compiler": CompilerDouble()})
        folders.append(folder)
        profiles.extend(batch.profiles)
        return plans

    def write(folder: Path, manifest: Manifest) -> Manifest:
        complete = write_manifest(folder, manifest)
        book.enter(BundleFiles.open(folder), manifest.plans, profiles)
        return complete

    profiles: list[Profile] = []
    patch.setattr(uniform_plans, "build_plans", build)
    patch.setattr(uniform_plans, "write_manifest", write)
    return folders

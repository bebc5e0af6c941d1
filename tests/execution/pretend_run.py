"""A small run of the stages on the processor, a GPU or the pretended device.

A process of its own, since PyTorch counts devices once, before its first backward pass.
"""

from pathlib import Path

import torch

from adatsq_trt.execution import InProcess
from adatsq_trt.execution.device import CPU, OnDevice
from adatsq_trt.formats import resolve_formats
from adatsq_trt.models import stored
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.settings import Settings
from adatsq_trt.stages.context import Context, Memory
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.models import declared
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.zoo.loading import LoadedModel, PixelScale
from tests.execution.alike import BUDGET_BITS
from tests.execution.pretend_device import NAME, pretend_device
from tests.tiny_flux import make_tiny_flux
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image


def make_stored_flux() -> ModelAdapter:
    """Weights of bfloat16 in layers that leave theirs where they are."""
    adapter, stored.LEAST_NUMBERS = make_tiny_flux(32, 4), 1
    stored.fill(adapter.transformer, adapter.transformer.bfloat16().state_dict())
    return adapter


MODELS = {
    "flux": lambda: make_tiny_flux(32, 4),
    "stored": make_stored_flux,
    "wan": make_tiny_wan,
    "z-image": make_tiny_z_image,
}


def run(folder: Path, device: str, model: str, stage: str, formats: str, transform: str | None) -> None:
    """Run the stages up to one."""
    loaded = LoadedModel(model, MODELS[model](), "0" * 64, "0" * 64, 2, 2.0, PixelScale(1))
    place = pretend_device() if device == NAME else torch.device(device)
    executor = InProcess() if place.type == CPU else OnDevice(place)
    settings = Settings(
        model=model,
        weights_sha256="0" * 64,
        model_sha256="0" * 64,
        format_set=formats,
        formats=tuple(fmt.name for fmt in resolve_formats(formats)),
        targets=(),
        simulate=True,
        steps=2,
        guidance=2.0,
        budget_bits=BUDGET_BITS,
        beam=2,
        transform=transform,
        calibration_samples=2,
        selection_samples=2,
        held_out_samples=2,
    )
    # The pretended device has no room: backward passes go block by block, Hessians are summed a block at a time.
    memory = Memory() if place.type == CPU else Memory(0, backward_bytes=1)
    with RunDirectory.open(folder) as directory:
        run_stages(Context(directory, settings, declared(loaded, settings), memory, executor), stage)

"""What is planned for units of the backward sweep by block, and the memory that they take, both in bytes.

A process of its own, whose record Linux keeps.
"""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.shared_gradients import gradient_sums
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import Measured, backward_sweep, squared_gradients
from adatsq_trt.execution import InProcess
from adatsq_trt.formats import resolve_formats
from adatsq_trt.image import ImageShape
from adatsq_trt.models.flow import measure_flow
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.search.sensitivity import Candidates, measure_contributions
from adatsq_trt.settings import Settings
from adatsq_trt.solver import State
from adatsq_trt.stages.memory import gradient_bytes, sweep_bytes
from adatsq_trt.stages.meter import release_memory, resident_bytes

FORMATS = resolve_formats("w4a4,w8a8")


def make_adapter() -> WanAdapter:
    """Three blocks and 1,152 tokens."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=1024,
        num_layers=3,
        rope_max_seq_len=128,
    )
    transformer.requires_grad_(False)
    encoder = TextEncoder(("a",), ("a",), text_tokens=9, width=32)
    video = ImageShape(48, channels=1, frames=2)
    return WanAdapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(), video, guidance_distilled=True)


def forget_record() -> None:
    """Linux begins a new record of the resident memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def record_bytes() -> int:
    """Largest resident memory of the record; what `getrusage` says may be of the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure_sweep(kind: str, count: int) -> tuple[int, int]:
    """One step with that many projections: what was planned, and what it took."""
    adapter = make_adapter()
    samples = Samples(adapter, adapter.schedule(1), 1.0, prompts=(0,), seeds=(0,))
    layers = adapter.quantizable_layers()
    names = tuple(fmt.name for fmt in FORMATS)
    settings = Settings.model_construct(formats=names, projections=count, calibration_samples=1, hessian="coherent")
    shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
    flow, blocks = measure_flow(adapter, samples.schedule, 1.0), adapter.layers_by_block()
    if kind == "gradients":
        by_block = [[(layers[n].in_features, layers[n].out_features) for n in names] for names in blocks.values()]
        planned = gradient_bytes(settings, flow, by_block)
    else:
        planned = sweep_bytes(settings, flow, shapes)[kind == "sensitivity"]
    weights = {f.name: {n: quantize_nearest(layer.weight, f) for n, layer in layers.items()} for f in FORMATS}
    latents, start = samples.noise()[None], projections(1, adapter.latent_shape, count, 0)
    samples.velocity(latents[0], 0)  # what libraries keep from their first call on
    workers = InProcess()
    if kind == "sensitivity":
        extra, measure = Candidates(FORMATS, CandidateWeights(weights, {})), measure_contributions
    else:
        extra, measure = None, squared_gradients
    release_memory()
    forget_record()
    before = resident_bytes()
    if kind == "gradients":
        latents = torch.stack([latents[0], latents[0]])
        common = workers.share(Measured(samples, extra=True, by_block=True))
        list(gradient_sums(workers, common, latents, start, blocks[adapter.blocks()[1]], at_once=1))
    else:
        common = workers.share(Measured(samples, extra, by_block=True))
        list(backward_sweep(workers, common, measure, latents, State(start), 0))
    return planned, record_bytes() - before


if __name__ == "__main__":
    with torch.no_grad():
        for word in sys.argv[1:]:
            kind, _, count = word.partition(":")
            planned, taken = measure_sweep(kind, int(count))
            sys.stdout.write(f"{planned} {taken}\n")

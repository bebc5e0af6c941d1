"""A bundle of a tiny model, without a search: for what runs bundles."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    POLICY_NAME,
    POSITIONS_NAME,
    PROMPTS_NAME,
    SCALES_NAME,
    VAE_FOLDER,
    BundleFiles,
    ImageSpec,
    Layout,
    Manifest,
    ScheduleRecord,
    ShapeRecord,
    write_manifest,
)
from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.export import export_graphs, export_plugin_graphs
from adatsq_trt.files import write_tensors
from adatsq_trt.formats import FORMATS
from adatsq_trt.image import PixelScale
from adatsq_trt.models.adapter import AnySize, Conditioning, ModelAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.text_call import TextCall
from tests.traces import trace_once

STEPS, GUIDANCE = 4, 2.0


def write_bundle(
    folder: Path,
    adapter: ModelAdapter,
    inputs: Mapping[str, Tensor],
    prompts: Conditioning,
    any_size: AnySize | None = None,
    others: Sequence[ModelAdapter] = (),
    variants: Sequence[str] = ("cpu",),
    steps: int = STEPS,
    layout: Layout = "embedded",
    text: TextCall | None = None,
    vae: Path | None = None,
    pixels: tuple[int, ...] | None = None,
    lora_slots: int | None = None,
) -> BundleFiles:
    """Three buckets over two assignments, with weights rounded to nearest.

    Args:
        folder: receives the bundle.
        adapter: the model.
        inputs: an example for the trace; no other dimension has the size of its batch.
        prompts: stored by the bundle; one row for the unguided branch.
        any_size: for a bundle of several sizes: what is traced.
        others: the model at the sizes beside its own.
        variants: of the graphs; plans are made of "target".
        steps: of the loop.
        layout: "plugin" for a graph of plugin nodes; the others have the same graphs.
        text: how the pipeline encodes a text.
        vae: folder of the VAE, for latents that one decodes.
        pixels: size of what is drawn.
        lora_slots: rank of the branches for LoRAs.
    """
    layers = adapter.quantizable_layers()
    rows = [["fp8"] * len(layers), [("bf16", "fp8")[i % 2] for i in range(len(layers))]]
    policy = Policy.from_steps("tiny", "0" * 64, list(layers), [rows[step in (1, 2)] for step in range(steps)])
    weights = {
        name: {layer: quantize_nearest(module.weight.detach(), FORMATS[name]) for layer, module in layers.items()}
        for name in ("fp8", "bf16")
    }
    common = (inputs, "velocity", torch.bfloat16, adapter.float32_inputs)
    if any_size is None:
        traced = trace_once(adapter.trace_module(), *common)
    else:
        traced = trace_once(any_size.module, *common, any_size.positions, any_size.axes)
        write_positions(folder, (adapter, *others))
    graphs, blocks = folder / GRAPH_FOLDER, adapter.blocks()
    if layout == "plugin":
        index = export_plugin_graphs(traced, policy, weights, graphs, "bfloat16", blocks)
    else:
        common = (traced, policy, weights, graphs, "bfloat16", blocks, variants)
        index = export_graphs(*common, lora_slots=lora_slots)
    policy.save(folder / POLICY_NAME)
    write_tensors(folder / SCALES_NAME, {"fp8": torch.full((steps, len(layers)), 1 / 64)})
    stored = {f"conditional.{name}": value for name, value in prompts.conditional.items()}
    stored |= {f"unconditional.{name}": value for name, value in (prompts.unconditional or {}).items()}
    write_tensors(folder / PROMPTS_NAME, stored)
    if vae is not None:
        shutil.copytree(vae, folder / VAE_FOLDER)
    manifest = Manifest(
        model="tiny",
        architecture=adapter.architecture,
        backend="onnxruntime",
        layout=layout,
        targets=("sm120",),
        base_type=index.base_type,
        formats=("bf16", "fp8"),
        schedule=_schedule(adapter, steps),
        guidance=GUIDANCE,
        rescaled_guidance=adapter.rescaled_guidance,
        latent_shape=adapter.latent_shape,
        image=ImageSpec(**vars(adapter.image)),
        pixels=pixels,
        shapes=tuple(_shape(own) for own in (adapter, *others)) if any_size is not None else (),
        prompts=len(next(iter(prompts.conditional.values()))),
        prompt_texts=adapter.prompts if text is not None else (),
        call=adapter.pipeline_call(),
        text=text,
        lora_slots=None if lora_slots is None else _slots(adapter, lora_slots),
        plans=(),
        versions={},
    )
    write_manifest(folder, manifest)
    return BundleFiles.open(folder)


def _slots(adapter: ModelAdapter, rank: int) -> LoraSlots:
    layers = {name: (own.in_features, own.out_features) for name, own in adapter.quantizable_layers().items()}
    return LoraSlots(rank=rank, layers=layers, pipeline="FluxPipeline", transformer={})


def write_positions(folder: Path, adapters: Sequence[ModelAdapter]) -> None:
    """What graphs for several sizes are told at each."""
    tensors = {}
    for adapter in adapters:
        tensors |= {f"{_shape(adapter).name}.{n}": value for n, value in adapter.any_size().positions.items()}
    write_tensors(folder / POSITIONS_NAME, tensors)


def _schedule(adapter: ModelAdapter, steps: int = STEPS) -> ScheduleRecord:
    return ScheduleRecord.of(adapter.schedule(steps))


def _shape(adapter: ModelAdapter) -> ShapeRecord:
    return ShapeRecord(
        size=PixelScale(2).size(adapter.image),
        batches=(1, 4),
        latent_shape=adapter.latent_shape,
        image=ImageSpec(**vars(adapter.image)),
        schedule=_schedule(adapter),
    )

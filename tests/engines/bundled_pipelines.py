"""Tiny pipelines of Z-Image, Wan and Qwen-Image with bundles of their transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.qwen_image import QwenImageAdapter
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.models.z_image import ZImageAdapter
from adatsq_trt.schedule import EULER, HEUN, UNIPC
from tests.tiny_bundle import GUIDANCE, STEPS, write_bundle
from tests.tiny_checkpoints import HEIGHT, LATENT_CHANNELS, T5_WIDTH, WIDTH, make_wan_pipeline, make_z_image_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline, make_scheduler
from tests.tiny_z_image import PROMPTS, WORDS

TEXT, LENGTH = ["a red three", "seven and a green three and a red seven"], 32
FRAMES = 9  # of which Wan's VAE makes three
KINDS = {
    "z-image": (make_z_image_pipeline, ZImageAdapter, None, {"guidance_scale": GUIDANCE - 1}),
    "wan": (make_wan_pipeline, WanAdapter, 3, {"guidance_scale": GUIDANCE, "num_frames": FRAMES}),
    # With the scheduler that Wan's pipelines come with.
    "wan-unipc": (make_wan_pipeline, WanAdapter, 3, {"guidance_scale": GUIDANCE, "num_frames": FRAMES}),
    "wan-heun": (make_wan_pipeline, WanAdapter, 3, {"guidance_scale": GUIDANCE, "num_frames": FRAMES}),
    "qwen-image": (make_qwen_image_pipeline, QwenImageAdapter, None, {"true_cfg_scale": GUIDANCE}),
}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Class and options; Euler's for the others.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan-unipc": (UNIPC, _FLOW),
    "wan-heun": (HEUN, {"shift": 3.0}),
    "qwen-image": (EULER, {k: v for k, v in make_scheduler().config.items() if not k.startswith("_")}),
}


def make_bundled(
    name: str, folder: Path, variants: Sequence[str] = ("cpu",), layout: Layout = "embedded"
) -> tuple[DiffusionPipeline, BundleFiles]:
    """A pipeline as it is, and a bundle of its transformer.

    Args:
        name: one of `KINDS`.
        folder: receives the bundle.
        variants: of the graphs; plans are made of "target".
    """
    make, kind, frames, _ = KINDS[name]
    # Six heads make all layers of Z-Image as wide as the plugin's kernels need.
    pipe = make_z_image_pipeline(heads=6) if (name, layout) == ("z-image", "plugin") else make()
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # equal examples, so that pipelines with one transformer have one trace
        encoder = TextEncoder(WORDS, PROMPTS, LENGTH, T5_WIDTH)
    kind_of, options = SCHEDULERS.get(name, (EULER, {"shift": 3.0}))
    scheduler = getattr(diffusers, kind_of)(**options)
    side = 2 if kind is QwenImageAdapter else 1  # cells of a latent's patch
    rows, columns = HEIGHT // (8 * side), WIDTH // (8 * side)
    image = ImageShape(rows, LATENT_CHANNELS, patch_size=side, columns=columns, frames=frames)
    adapter = kind(pipe.transformer, encoder, scheduler, image)
    steps = STEPS + 1 if kind_of == HEUN else STEPS  # an odd number of calls
    latents = torch.randn(7, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts = adapter.encode([i % len(PROMPTS) for i in range(7)])
        inputs = adapter.model_inputs(latents, 0.5, prompts.conditional, GUIDANCE)
        stored = adapter.encode(range(len(PROMPTS)))
    unguided = {name: value[:1].clone() for name, value in (stored.unconditional or {}).items()}
    stored = type(stored)({n: v.contiguous() for n, v in stored.conditional.items()}, unguided)
    return pipe, write_bundle(folder, adapter, inputs, stored, variants=variants, steps=steps, layout=layout)

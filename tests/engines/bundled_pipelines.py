"""Tiny pipelines of Z-Image and Wan with bundles of their transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.models.z_image import ZImageAdapter
from tests.tiny_bundle import GUIDANCE, write_bundle
from tests.tiny_checkpoints import HEIGHT, LATENT_CHANNELS, T5_WIDTH, WIDTH, make_wan_pipeline, make_z_image_pipeline
from tests.tiny_z_image import PROMPTS, WORDS

TEXT, LENGTH = ["a red three", "seven and a green three and a red seven"], 32
FRAMES = 9  # of which Wan's VAE makes three
KINDS = {
    "z-image": (make_z_image_pipeline, ZImageAdapter, None, {"guidance_scale": GUIDANCE - 1}),
    "wan": (make_wan_pipeline, WanAdapter, 3, {"guidance_scale": GUIDANCE, "num_frames": FRAMES}),
    # With the scheduler that Wan's pipelines come with.
    "wan-unipc": (make_wan_pipeline, WanAdapter, 3, {"guidance_scale": GUIDANCE, "num_frames": FRAMES}),
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
    encoder = TextEncoder(WORDS, PROMPTS, LENGTH, T5_WIDTH)
    scheduler = pipe.scheduler if name == "wan-unipc" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    image = ImageShape(HEIGHT // 8, LATENT_CHANNELS, patch_size=1, columns=WIDTH // 8, frames=frames)
    adapter = kind(pipe.transformer, encoder, scheduler, image)
    latents = torch.randn(7, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts = adapter.encode([i % len(PROMPTS) for i in range(7)])
        inputs = adapter.model_inputs(latents, 0.5, prompts.conditional, GUIDANCE)
        stored = adapter.encode(range(len(PROMPTS)))
    unguided = {name: value[:1].clone() for name, value in (stored.unconditional or {}).items()}
    stored = type(stored)({n: v.contiguous() for n, v in stored.conditional.items()}, unguided)
    return pipe, write_bundle(folder, adapter, inputs, stored, variants=variants, layout=layout)

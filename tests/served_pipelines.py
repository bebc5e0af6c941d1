"""Saved tiny pipelines with a bundle of their transformer, as `build engine` makes one but without a search."""

from dataclasses import dataclass
from pathlib import Path

import torch

from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.models.adapter import Conditioning
from adatsq_trt.settings import PipelineSettings
from tests import tiny_ltx
from tests.tiny_bundle import write_bundle
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_flux_pipeline, make_wan_pipeline, make_z_image_pipeline
from tests.tiny_chroma import make_chroma_pipeline
from tests.tiny_flux_2 import make_flux_2_pipeline, make_klein_pipeline
from tests.tiny_hunyuan_video import make_hunyuan_video_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline

MAKERS = {
    "flux": make_flux_pipeline,
    "z_image": make_z_image_pipeline,
    "wan": make_wan_pipeline,
    "qwen_image": make_qwen_image_pipeline,
    "stable_diffusion_3": make_stable_diffusion_3_pipeline,
    "flux_2": make_flux_2_pipeline,
    "flux_2_klein": make_klein_pipeline,
    "chroma": make_chroma_pipeline,
    "ltx": tiny_ltx.make_ltx_pipeline,
    "hunyuan_video_15": make_hunyuan_video_pipeline,
}
VIDEOS = ("wan", "hunyuan_video_15")
PROMPTS, NEGATIVE = ("a red three", "a green seven"), "three"
_ROWS = 20  # of an example; no other dimension has this size


@dataclass(frozen=True)
class SavedPipeline:
    """A pipeline's folder, and the bundle of its transformer."""

    folder: Path
    bundle: BundleFiles


def save_and_build(name: str, folder: Path) -> SavedPipeline:
    """One of `MAKERS` in a folder, with the second branch of guidance for `NEGATIVE` where it has one."""
    saved = folder / "pipeline"
    MAKERS[name]().save_pretrained(saved)
    sizes = {"height": HEIGHT, "width": WIDTH, "frames": 5 if name in VIDEOS else None}
    if name == "ltx":
        sizes = {"height": tiny_ltx.HEIGHT, "width": tiny_ltx.WIDTH, "frames": tiny_ltx.FRAMES}
    negative = "" if name in ("flux", "flux_2") else NEGATIVE
    opened = open_pipeline(PipelineSettings(path=str(saved), prompts=PROMPTS, negative_prompt=negative, **sizes))
    model = opened.load(opened.encode(lambda: None))
    adapter = model.adapter
    latents = torch.randn(_ROWS, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        example = adapter.model_inputs(latents, 0.5, adapter.encode([0] * _ROWS).conditional, 2.0)
        stored = adapter.encode(range(len(PROMPTS)))
    second = stored.unconditional and {name: value[:1] for name, value in stored.unconditional.items()}
    with adapter.as_stored():  # of HunyuanVideo's layers one is large enough
        made = write_bundle(
            folder / "bundle",
            adapter,
            example,
            Conditioning(stored.conditional, second),
            text=opened.text_call,
            vae=model.vae,
            pixels=model.scale.size(adapter.image),
        )
    return SavedPipeline(saved, made)

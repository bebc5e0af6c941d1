"""Wan 2.2 in small: a pipeline with two transformers of different weights, and the scheduler that it comes with."""

from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_image_pipeline, make_wan_pipeline

BOUNDARY_RATIO = 0.875
STEPS, FRAMES, PROMPTS = 5, 5, ("a red", "three green and seven")
SCALES = {"guidance": 4.0, "guidance_2": 2.5}
SMALL: dict[str, Any] = {
    **{"target": "cpu", "steps": STEPS, "prompts": PROMPTS, "height": HEIGHT, "width": WIDTH, "frames": FRAMES},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}


def make_wan_experts_pipeline(boundary_ratio: float = BOUNDARY_RATIO) -> WanPipeline:
    """At five steps with flow shift 3 the timesteps are 999, 923, 818, 667 and 429: two are of the first expert."""
    one = make_wan_pipeline()
    parts = {**one.components, "transformer_2": _second(one)}
    return _ready(WanPipeline(**parts, boundary_ratio=boundary_ratio))


def make_wan_image_experts_pipeline(boundary_ratio: float = 0.9) -> WanImageToVideoPipeline:
    """Image to video, whose transformers see no embedding of the image."""
    one = make_wan_image_pipeline(embedded=False)
    parts = {**one.components, "transformer_2": _second(one)}
    return _ready(WanImageToVideoPipeline(**parts, boundary_ratio=boundary_ratio))


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to what was wanted."""
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def _ready(pipe: Any) -> Any:
    """Without dropout and a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    return pipe


def _second(one: WanPipeline | WanImageToVideoPipeline) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second: torch.nn.Module = type(one.transformer).from_config(one.transformer.config)
    with torch.no_grad():  # so that it shows in the latents which of them was called, and how it was guided
        for expert in (one.transformer, second):
            expert.proj_out.weight.mul_(8)
    return second

"""Wan 2.2 from image to video: two transformers that are shown a first image, in one bundle and in the pipeline."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline

import adatsq_trt
from adatsq_trt.checkpoints.images import made_image
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.models.family import Canvas
from tests.tiny_checkpoints import HEIGHT, WIDTH
from tests.tiny_wan_experts import (
    FRAMES,
    PROMPTS,
    SCALES,
    SMALL,
    STEPS,
    distance,
    make_wan_image_experts_pipeline,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Bundle]]:
    folder = tmp_path_factory.mktemp("image-experts")
    make_wan_image_experts_pipeline().save_pretrained(folder / "pipeline")
    with adatsq_trt.build(folder / "pipeline", output=folder / "run", **SMALL, **SCALES) as bundle:
        yield folder, bundle


def draw(pipe: WanImageToVideoPipeline, noise: np.ndarray, images: tuple[int, ...]) -> np.ndarray:
    """The latents that the pipeline ends with, of one sample after the other, each with an image that is made here."""
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": STEPS}
    scales = {"guidance_scale": SCALES["guidance"], "guidance_scale_2": SCALES["guidance_2"]}
    rows = [
        pipe(
            made_image(image, Canvas(HEIGHT, WIDTH)),
            prompt,
            latents=torch.from_numpy(noise[index : index + 1]),
            **{"output_type": "latent", "return_dict": False, **size, **scales},
        )[0].numpy()
        for index, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True))
    ]
    return np.concatenate(rows)


def test_both_experts_are_shown_the_image(built: tuple[Path, Bundle]) -> None:
    """Against the pipeline in full precision; with the images exchanged, or the experts, it would be another video."""
    _, bundle = built
    noise, exchanged = bundle.noise([4, 5]), make_wan_image_experts_pipeline()
    wanted = draw(make_wan_image_experts_pipeline(), noise, (0, 1))
    assert distance(bundle.denoise(noise, bundle.conditioning([0, 1]), quantized=False), wanted) < 1e-4
    exchanged.transformer, exchanged.transformer_2 = exchanged.transformer_2, exchanged.transformer
    others = draw(make_wan_image_experts_pipeline(), noise, (1, 0)), draw(exchanged, noise, (0, 1))
    assert min(distance(other, wanted) for other in others) > 1e-3


def test_the_bundle_takes_the_places_of_both_in_the_unmodified_pipeline(built: tuple[Path, Bundle]) -> None:
    folder, bundle = built
    pipe, noise = make_wan_image_experts_pipeline(), bundle.noise([4, 5])
    pipe.transformer, pipe.transformer_2 = AdatsqTransformer.experts_from_bundle(bundle, scheduler=pipe.scheduler)
    full = draw(make_wan_image_experts_pipeline(), noise, (0, 1))
    quantized = bundle.denoise(noise, bundle.conditioning([0, 1]))
    # Samples of another batch are added up in another order, and what differs in its last bits may be rounded to
    # neighbouring points of int8: each is as far from full precision as rounding is.
    rounding = distance(quantized, full)
    assert distance(draw(pipe, noise, (0, 1)), quantized) < 2 * rounding
    assert distance(draw(pipe, noise, (1, 0)), quantized) > 5 * rounding
    assert adatsq_trt.check(folder / "run").passed

"""A bundle whose prompts are encoded with the image that goes with each: Qwen-Image-Edit, from a folder to pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

import adatsq_trt
from adatsq_trt.checkpoints.images import made_image
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.models.family import Canvas
from adatsq_trt.stages.images import shown_conditioning
from tests.tiny_qwen_image_edit import SIDE, make_edit_pipeline

PROMPTS, NEGATIVE, GUIDANCE = ("a red and green", "three"), "seven", 4.0
pytestmark = pytest.mark.slow  # a whole build: the parts of it are tested in tests/engines and tests/models
TEXT = "encoder_hidden_states"
SMALL = {"steps": 2, "calibration_samples": 2, "selection_samples": 2, "held_out_samples": 1, "formats": "fp32,w8a8s"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Bundle]]:
    """A saved pipeline, three images and a run with the first two of them."""
    folder = tmp_path_factory.mktemp("edit")
    make_edit_pipeline().save_pretrained(folder / "pipeline")
    (folder / "images").mkdir()
    for index, place in enumerate(("images/a.png", "images/b.png", "photo.png")):
        made_image(index, Canvas(128, 128)).save(folder / place)
    drawn = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "height": SIDE, "width": SIDE, "guidance": GUIDANCE}
    options = {**SMALL, **drawn, "images": folder / "images"}
    with adatsq_trt.build(folder / "pipeline", target="cpu", output=folder / "run", **options) as bundle:
        yield folder, bundle


def draw(pipe: QwenImageEditPipeline, bundle: Bundle, image: Path, prompt: int, **changes: Any) -> np.ndarray:
    """The latents that the pipeline ends with."""
    pipe.set_progress_bar_config(disable=True)
    request = {
        "image": Image.open(image),
        "prompt": [PROMPTS[prompt]],
        "negative_prompt": NEGATIVE,
        "true_cfg_scale": GUIDANCE,
        "num_inference_steps": 2,
        "latents": torch.from_numpy(bundle.noise([3])),
        "output_type": "latent",
        "return_dict": False,
    }
    latents: torch.Tensor = pipe(**{**request, **changes})[0]
    return latents.numpy()


def loop(bundle: Bundle, conditioning: Conditioning, quantized: bool = False) -> np.ndarray:
    latents: np.ndarray = bundle.denoise(bundle.noise([3]), conditioning, quantized=quantized)
    return latents


def sample(conditioning: Conditioning, index: int) -> Conditioning:
    conditional, unconditional = (
        {name: value[index : index + 1] for name, value in (branch or {}).items()}
        for branch in (conditioning.conditional, conditioning.unconditional)
    )
    return Conditioning(conditional, unconditional)


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def test_the_bundle_draws_what_the_pipeline_draws(built: tuple[Path, Bundle]) -> None:
    """Of the image that it holds with a prompt, and of the user's, in its own loop and in the unmodified pipeline."""
    folder, bundle = built
    pipe, photo = make_edit_pipeline(), folder / "photo.png"
    held, several = bundle.conditioning([1]), shown_conditioning(bundle, [0, 1, 0], photo, None)
    shown = sample(several, 1)
    wanted = draw(pipe, bundle, photo, 1)
    assert distance(loop(bundle, held), draw(pipe, bundle, folder / "images" / "b.png", 1)) < 1e-4
    assert distance(loop(bundle, shown), wanted) < 1e-4
    assert distance(loop(bundle, held), wanted) > 3e-4
    # Each sample has its own prompt; the image, and the negative prompt with it, are the same for all.
    first, last = sample(several, 0), sample(several, 2)
    assert first.unconditional is not None
    assert last.unconditional is not None
    assert shown.unconditional is not None
    for name, value in first.conditional.items():
        np.testing.assert_array_equal(last.conditional[name], value)
        np.testing.assert_array_equal(shown.unconditional[name], first.unconditional[name])
    assert not np.array_equal(shown.conditional[TEXT], first.conditional[TEXT])

    quantized = loop(bundle, shown, quantized=True)
    rounding = distance(quantized, wanted)
    pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
    # Inputs that differ in their last bits may be rounded to neighbouring points of int8.
    assert distance(draw(pipe, bundle, photo, 1), quantized) < 2 * rounding
    size = {"height": SIDE // 2, "width": SIDE // 2, "latents": None}
    made_image(5, Canvas(128, 512)).save(folder / "long.png")
    for image, changes, message in (
        ("photo.png", size, "give the QwenImageEditPipeline an image of 1024x1024 pixels"),
        ("long.png", {}, "exported for a picture and one image, each of 16 x 16 tokens"),
    ):
        with pytest.raises(MismatchError, match=message):
            draw(pipe, bundle, folder / image, 1, **changes)


def test_check_passes_and_each_prompt_has_its_own_negative(built: tuple[Path, Bundle]) -> None:
    folder, bundle = built
    assert adatsq_trt.check(folder / "run").passed
    negative = bundle.files.prompts[f"unconditional.{TEXT}"]
    assert len(negative) == len(PROMPTS)
    assert not np.array_equal(*negative)
    both = bundle.conditioning([1, 0])
    assert both.unconditional is not None
    np.testing.assert_array_equal(both.unconditional[TEXT], negative[::-1])


def test_images_of_another_shape_and_text_encoders_that_have_changed(built: tuple[Path, Bundle]) -> None:
    folder, bundle = built
    made_image(4, Canvas(96, 128)).save(folder / "wide.png")
    with pytest.raises(UserError, match=r"--image '.*wide.png': the pipeline makes 896x1184 pixels .* of 96x128"):
        shown_conditioning(bundle, [0], folder / "wide.png", None)
    config = folder / "pipeline" / "text_encoder" / "config.json"
    was = config.read_text()
    config.write_text(was + " ")
    try:
        with pytest.raises(MismatchError, match=r"'text_encoder/config.json' .* which is not where its run says"):
            shown_conditioning(bundle, [0], folder / "photo.png", None)
    finally:
        config.write_text(was)


def test_it_is_not_served(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of a QwenImageEditPipeline, which takes an image beside the prompt"):
        write_repository([Deployment("edit", built[1].files)], tmp_path / "repository")

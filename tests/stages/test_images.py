"""A bundle of a model that takes an image and a mask beside the prompt, from a folder to pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adatsq_trt
from adatsq_trt.checkpoints.images import made_image, made_mask
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, UserError
from adatsq_trt.files import read_tensors
from adatsq_trt.models import families
from adatsq_trt.models.family import Canvas
from adatsq_trt.stages.images import require_servable, shown_image
from tests.tiny_checkpoints import (
    HEIGHT,
    WIDTH,
    make_fill_pipeline,
    make_flux_pipeline,
    make_kontext_pipeline,
    make_wan_image_pipeline,
)

PROMPTS = ("a red and green", "three")
SMALL = {"steps": 2, "calibration_samples": 2, "selection_samples": 2, "held_out_samples": 1, "formats": "fp32,w8a8s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, and the image and the mask of a user."""
    folder = tmp_path_factory.mktemp("fill")
    make_fill_pipeline().save_pretrained(folder / "pipeline")
    made_image(11, Canvas(HEIGHT, WIDTH)).save(folder / "photo.png")
    made_mask(11, (WIDTH, HEIGHT)).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> BundleFiles:
    """Built from it."""
    options = {**SMALL, "prompts": PROMPTS, "height": HEIGHT, "width": WIDTH}
    adatsq_trt.build(folder / "pipeline", target="cpu", output=folder / "run", **options)
    return BundleFiles.open(folder / "run")


def draw(files: BundleFiles, image: Path, mask: Path) -> np.ndarray:
    """The full-precision latents of the second prompt."""
    with Bundle(files) as bundle:
        conditioning = bundle.conditioning([1], shown_image(files, image, mask))
        latents: np.ndarray = bundle.denoise(bundle.noise([3]), conditioning, quantized=False)
        return latents


def test_a_bundle_draws_what_the_pipeline_draws_of_the_users_image(files: BundleFiles, folder: Path) -> None:
    """The bundle's own loop, and the bundle in the unmodified pipeline."""
    photo, mask = folder / "photo.png", folder / "mask.png"
    ours = draw(files, photo, mask)
    pipe = make_fill_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part.eval()

    def pipelines(image: Path) -> np.ndarray:
        latents: torch.Tensor = pipe(
            prompt=[PROMPTS[1]],
            image=Image.open(image).convert("RGB"),
            mask_image=Image.open(mask),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=2,
            latents=torch.from_numpy(Bundle(files).noise([3])),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents.numpy()

    wanted = pipelines(photo)
    assert np.linalg.norm(ours - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert np.linalg.norm(draw(files, mask, mask) - wanted) > 1e-2 * np.linalg.norm(wanted)

    pipe.transformer = AdatsqTransformer.from_bundle(files.folder, pipe.scheduler)
    with Bundle(files) as bundle:
        shown = shown_image(files, photo, mask)
        quantized = bundle.denoise(bundle.noise([3]), bundle.conditioning([1], shown))
    # Inputs that differ in their last bits may be rounded to neighbouring points of int8.
    assert np.linalg.norm(pipelines(photo) - quantized) < 2 * np.linalg.norm(quantized - ours)
    assert np.linalg.norm(pipelines(mask) - quantized) > 1e-2 * np.linalg.norm(wanted)


def test_check_passes_and_notices_images_that_were_exchanged(files: BundleFiles, folder: Path) -> None:
    assert adatsq_trt.check(folder / "run").passed
    held = files.prompts["conditional.image_latents"]
    assert held.shape == (2, 12, 320)
    assert not np.array_equal(held[0], held[1])
    # The branch without a prompt has none of its own: its images are the prompts'.
    assert not [name for name in files.prompts if name.startswith("unconditional.")]


def test_a_pipeline_without_the_image_is_refused(files: BundleFiles) -> None:
    """A Flux's own pipeline gives the transformer latents alone."""
    pipe = make_flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = AdatsqTransformer.from_bundle(files.folder)
    message = (
        r"hidden_states: got \[1, 12, 64\].* 64 of hidden_states and 320 of image_latents along axis 2; give the Flux"
    )
    with pytest.raises(MismatchError, match=message):
        pipe("three", height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=torch.zeros(1, 12, 64))


def test_what_a_bundle_is_shown_is_what_it_takes(files: BundleFiles, folder: Path) -> None:
    photo, mask = folder / "photo.png", folder / "mask.png"
    with pytest.raises(UserError, match="takes an image beside the prompt, and got none; pass --image FILE"):
        shown_image(files, None, mask)
    with pytest.raises(UserError, match=r"takes a mask, .*, and got none; pass --mask FILE"):
        shown_image(files, photo, None)
    with pytest.raises(MissingFileError, match=r"gone.png' does not exist"):
        shown_image(files, folder / "gone.png", mask)
    with pytest.raises(DamagedFileError, match=r"settings.json' is not a complete image"):
        shown_image(files, folder / "run" / "settings.json", mask)
    text = replace(files, manifest=files.manifest.model_copy(update={"image_call": None}))
    assert shown_image(text, None, None) == {}
    with pytest.raises(UserError, match=r"--image '.*photo.png': bundle '.*' takes none"):
        shown_image(text, photo, None)
    call = files.manifest.image_call
    assert call is not None
    plain = files.manifest.model_copy(update={"image_call": call.model_copy(update={"masked": False})})
    with pytest.raises(UserError, match=r"--mask '.*mask.png': bundle '.*' takes none"):
        shown_image(replace(files, manifest=plain), photo, mask)


def test_no_text_is_taken_for_an_image(files: BundleFiles) -> None:
    text = files.prompts["conditional.encoder_hidden_states"][:1]
    with pytest.raises(
        UserError, match=r"images: got 'encoder_hidden_states', expected the bundle's inputs .*, image_lat"
    ):
        Bundle(files).conditioning([0], {"encoder_hidden_states": text})


def test_a_bundle_of_a_family_that_is_not_known_here(
    files: BundleFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [family for family in families.families() if family.pipeline != "FluxFillPipeline"]
    monkeypatch.setattr(families, "_FAMILIES", others)
    with pytest.raises(MismatchError, match="was built from a FluxFillPipeline, whose family here takes no such image"):
        shown_image(files, folder / "photo.png", folder / "mask.png")


def test_a_run_at_another_size_encodes_its_images_anew(tmp_path: Path) -> None:
    """As many latents, of another shape: nothing else would show that they are of the old size."""
    make_kontext_pipeline().save_pretrained(tmp_path / "pipeline")

    def latents(run: str, height: int, width: int) -> np.ndarray:
        size = {"height": height, "width": width, "prompts": PROMPTS, "target": "cpu"}
        adatsq_trt.calibrate(tmp_path / "pipeline", output=tmp_path / run, **SMALL, **size)
        return np.asarray(read_tensors(tmp_path / run / "embed" / "encodings.safetensors")["image.image_latents"])

    first, again = latents("run", 32, 64), latents("run", 64, 32)
    assert first.shape == again.shape
    assert not np.array_equal(first, again)
    assert np.array_equal(again, latents("fresh", 64, 32))


def test_images_are_not_served(files: BundleFiles, folder: Path, tmp_path: Path) -> None:
    message = "is of a FluxFillPipeline, which takes an image beside the prompt, and requests to the server carry none"
    with pytest.raises(UserError, match=message):
        write_repository([Deployment("fill", files)], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    with pytest.raises(UserError, match=message):  # before a build
        require_servable(folder / "pipeline")
    make_flux_pipeline().save_pretrained(tmp_path / "flux")
    require_servable(tmp_path / "flux")


def test_a_video_that_begins_with_an_image(tmp_path: Path) -> None:
    """With guidance, whose both branches see the image, and with an image encoder that the bundle does not carry."""
    pipe = make_wan_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    pipe.save_pretrained(tmp_path / "pipeline")
    options = {**SMALL, "prompts": PROMPTS, "height": HEIGHT, "width": WIDTH, "frames": 5, "guidance": 4.0}
    adatsq_trt.build(tmp_path / "pipeline", target="cpu", output=tmp_path / "run", **options)
    files = BundleFiles.open(tmp_path / "run")
    for index in range(2):
        made_image(30 + index, Canvas(70, 90)).save(tmp_path / f"{index}.png")

    def pipelines(index: int) -> np.ndarray:
        latents: torch.Tensor = pipe(
            prompt=[PROMPTS[0]],
            image=Image.open(tmp_path / f"{index}.png"),
            height=HEIGHT,
            width=WIDTH,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=4.0,
            latents=torch.from_numpy(Bundle(files).noise([3])),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents.numpy()

    with Bundle(files) as bundle:
        shown = bundle.conditioning([0], shown_image(files, tmp_path / "0.png", None))
        full = bundle.denoise(bundle.noise([3]), shown, quantized=False)
        quantized = bundle.denoise(bundle.noise([3]), shown)
    assert shown.unconditional is not None
    for name in ("image_latents", "encoder_hidden_states_image"):
        np.testing.assert_array_equal(shown.unconditional[name], shown.conditional[name])
        assert f"unconditional.{name}" not in files.prompts
    wanted = pipelines(0)
    assert np.linalg.norm(full - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert np.linalg.norm(pipelines(1) - wanted) > 3e-3 * np.linalg.norm(wanted)
    pipe.transformer = AdatsqTransformer.from_bundle(files.folder, pipe.scheduler)
    # Inputs that differ in their last bits may be rounded to neighbouring points of int8.
    assert np.linalg.norm(pipelines(0) - quantized) < 2 * np.linalg.norm(quantized - full)
    assert adatsq_trt.check(tmp_path / "run").passed

    encoder = tmp_path / "pipeline" / "image_encoder" / "config.json"
    encoder.write_text(encoder.read_text() + " ")
    with pytest.raises(MismatchError, match=r"the encoder 'image_encoder/config.json' .* which is not where its run"):
        shown_image(files, tmp_path / "0.png", None)

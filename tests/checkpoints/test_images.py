"""Images beside the prompts: what a pipeline's own VAE makes of them, and what the loop draws with it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.images import PREFIX, ImageSet, Picture, made_image, made_mask, read_image
from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline
from adatsq_trt.checkpoints.objects import open_object
from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, UserError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.models.family import Canvas
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

PROMPTS, STEPS, GUIDANCE = ("a red", "three green and seven"), 4, 4.0
CANVAS = Canvas(HEIGHT, WIDTH)
KINDS = ("kontext", "fill", "wan_image", "wan_frame")
FRAMES = 5  # of which Wan's VAE makes two


def settings(folder: Path, **changes: Any) -> PipelineSettings:
    frames = FRAMES if "wan" in folder.name else None
    return PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, frames=frames, prompts=PROMPTS, **changes)


def folder_of_images(folder: Path, masked: bool) -> Path:
    """Two images of another size than the picture, with a mask for one of them."""
    folder.mkdir()
    for index, name in enumerate(("b.png", "a.jpg")):
        made_image(index, Canvas(80, 96)).save(folder / name)
    if masked:
        made_mask(7, (96, 80)).save(folder / "b.mask.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


class Case:
    """A pipeline, and a sample of it with the second prompt."""

    def __init__(self, folder: Path, images: Path | None) -> None:
        self.opened: OpenedPipeline = open_pipeline(settings(folder, images=None if images is None else str(images)))
        self.encodings = self.opened.encode(lambda: None)
        self.name = folder.name
        self.pictures: list[Picture] = list(self.opened.images.pictures(2, CANVAS, masked="fill" in folder.name))
        self.pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)

    def samples(self, encodings: dict[str, Tensor] | None = None) -> Samples:
        adapter = self.opened.load(encodings or self.encodings).adapter
        return Samples(adapter, adapter.schedule(STEPS), GUIDANCE, prompts=(1,), seeds=(4,))

    def draw(self, picture: Picture) -> Tensor:
        """Latents that the pipeline itself ends with."""
        image, mask = picture
        own: dict[str, Any] = {"num_frames": FRAMES} if "wan" in self.name else {"mask_image": mask}
        if "kontext" in self.name:
            own = {"_auto_resize": False, "max_area": HEIGHT * WIDTH}
            # Which the pipeline does by itself, to a size that it prefers.
            image = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        latents: Tensor = self.pipe(
            image=image,
            prompt=[PROMPTS[1]],
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=self.samples().noise(),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
            **own,
        )[0]
        return latents


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("given", [False, True], ids=["made", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_draws_what_the_pipeline_draws_of_an_image(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, given: bool
) -> None:
    images = folder_of_images(tmp_path / "images", kind == "fill") if given else None
    case = Case(request.getfixturevalue(f"saved_{kind}"), images)
    drawn = trajectory(case.samples())[-1]
    assert distance(drawn, case.draw(case.pictures[1])) < 1e-4
    # Another image is another picture, and so is none.
    assert distance(drawn, case.draw(case.pictures[0])) > 3e-4
    names = [name for name in case.encodings if name.startswith(PREFIX)]
    assert len(names) == (2 if kind == "wan_image" else 1)
    for name in names:
        without = trajectory(case.samples({**case.encodings, name: torch.zeros_like(case.encodings[name])}))[-1]
        assert distance(without, drawn) > 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_of_a_model_is_that_of_its_images_too(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    saved = request.getfixturevalue(f"saved_{kind}")
    images = folder_of_images(tmp_path / "images", kind == "fill")

    def sha256() -> str:
        return open_pipeline(settings(saved, images=str(images))).model_sha256

    first = sha256()
    assert first != open_pipeline(settings(saved)).model_sha256
    assert sha256() == first
    made_image(5, CANVAS).save(images / "a.jpg")
    assert sha256() != first


@pytest.mark.parametrize("kind", ["kontext", "wan_image"])
def test_a_pipeline_in_memory_encodes_the_same(request: pytest.FixtureRequest, kind: str) -> None:
    saved = request.getfixturevalue(f"saved_{kind}")
    pipe = DiffusionPipeline.from_pretrained(saved, local_files_only=True)
    held, read = open_object(pipe, settings(saved)), open_pipeline(settings(saved))
    assert held.image_call == read.image_call
    got, wanted = (opened.encode(lambda: None) for opened in (held, read))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def test_a_pipeline_in_memory_without_its_image_encoder_is_refused(saved_wan_image: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved_wan_image, local_files_only=True)
    pipe.image_encoder = None
    with pytest.raises(UserError, match="the pipeline has no image_encoder, which its transformer needs"):
        open_object(pipe, settings(saved_wan_image))


def test_texts_of_another_length_beside_an_embedding_are_refused(saved_wan_image: Path) -> None:
    """The transformer would take some of a text's tokens for the image's."""
    opened = open_pipeline(settings(saved_wan_image))
    encodings = opened.encode(lambda: None)
    with pytest.raises(MismatchError, match=r"texts of 9 tokens: .* takes 512"):
        opened.load({**encodings, "tokens": encodings["tokens"][:, :9]})


def test_models_of_text_alone_are_what_they_were(saved_flux: Path) -> None:
    opened = open_pipeline(settings(saved_flux))
    assert opened.images_sha256 is None
    assert sorted(opened.encode(lambda: None)) == ["pooled", "tokens"]


def test_images_for_a_pipeline_that_takes_none_are_refused(saved_flux: Path, tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", masked=False)
    with pytest.raises(UserError, match=r"--images '.*': a FluxPipeline takes no image beside the prompt"):
        open_pipeline(settings(saved_flux, images=str(images)))


def test_a_graph_with_an_image_has_one_size(saved_kontext: Path) -> None:
    adapter = open_pipeline(settings(saved_kontext)).outline.adapter
    with pytest.raises(MismatchError, match="has one size; leave --shapes out"):
        adapter.any_size()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: folder / "gone", MissingFileError, "there is no such folder; expected a folder with images"),
        (lambda folder: folder / "a.jpg", MissingFileError, "there is no such folder"),
        (lambda folder: (folder / "a.jpg").unlink() or (folder / "b.png").unlink() or folder, UserError, "no image"),
        (lambda folder: (folder / "b.png").rename(folder / "c.mask.png").parent, UserError, "no image of that name"),
        (lambda folder: (folder / "a.jpg").rename(folder / "b.mask.png").parent, UserError, "takes no mask"),
        (lambda folder: (folder / "a.jpg").rename(folder / "b.MASK.png").parent, UserError, "takes no mask"),
    ],
    ids=["gone", "file", "empty", "lonely-mask", "mask", "capital-mask"],
)
def test_folders_that_are_no_folders_of_images(
    saved_kontext: Path, tmp_path: Path, change: Any, error: type[UserError], message: str
) -> None:
    images = change(folder_of_images(tmp_path / "images", masked=False))
    with pytest.raises(error, match=message):
        open_pipeline(settings(saved_kontext, images=str(images)))


def test_a_file_that_is_no_image_is_named(saved_kontext: Path, tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", masked=False)
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    with pytest.raises(DamagedFileError, match=r"a\.jpg' is not a complete image"):
        open_pipeline(settings(saved_kontext, images=str(images))).encode(lambda: None)


def test_two_masks_of_one_image_and_folders_that_are_called_like_images(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", masked=True)
    (images / "c.png").mkdir()
    assert [file.name for file, _ in ImageSet.of(images, masked=True).files] == ["a.jpg", "b.png"]
    made_mask(1, (8, 8)).save(images / "b.Mask.webp")
    with pytest.raises(UserError, match=r"b.*' and '.*b.*' are masks of one image; keep one of them"):
        ImageSet.of(images, masked=True)


def test_an_image_of_16_bits_is_refused_before_it_is_cut_off_at_white(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(file)
    with pytest.raises(DamagedFileError, match=r"deep.png' has more than 8 bits per channel .*; save it with 8"):
        read_image(file)


def test_a_vae_whose_latents_are_not_finite_is_refused(saved_kontext: Path, tmp_path: Path) -> None:

    folder = Path(shutil.copytree(saved_kontext, tmp_path / "kontext"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)
    tensors["encoder.conv_in.bias"][0] = float("nan")
    write_tensors(weights, tensors)
    with pytest.raises(DamagedFileError, match="'image_latents' of image 0 has NaN"):
        open_pipeline(settings(folder)).encode(lambda: None)


def test_images_that_are_left_over_are_told(saved_kontext: Path, tmp_path: Path, caplog: Any) -> None:
    images = folder_of_images(tmp_path / "images", masked=False)
    made_image(2, CANVAS).save(images / "z.webp")
    open_pipeline(settings(saved_kontext, images=str(images)))
    assert "--images: the first 2 of 3 images are drawn, one with each prompt" in caplog.text


def test_images_made_here_are_the_same_at_every_call_and_differ() -> None:
    images = [np.asarray(made_image(index, CANVAS)) for index in range(8)]
    assert all(image.shape == (HEIGHT, WIDTH, 3) for image in images)
    np.testing.assert_array_equal(images[3], np.asarray(made_image(3, CANVAS)))
    assert len({image.tobytes() for image in images}) == 8
    for index in range(50):
        covered = np.asarray(made_mask(index, (WIDTH, HEIGHT)))
        assert set(np.unique(covered)) == {0, 255}
    assert np.asarray(made_mask(0, (1, 1))).shape == (1, 1)
    assert ImageSet().lines(3) == ImageSet().lines(4) != []

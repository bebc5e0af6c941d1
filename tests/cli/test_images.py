"""Images beside the prompt from the command line: a Flux Kontext from folder to plans, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adatsq_trt.checkpoints.images import made_image
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from adatsq_trt.models.family import Canvas
from adatsq_trt.stages.images import shown_image
from tests.cli.conftest import CommandLine
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_kontext_pipeline

PROMPTS = ("a red and green", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with two images for calibration, and a run of it with plans."""
    folder = tmp_path_factory.mktemp("kontext")
    make_kontext_pipeline().save_pretrained(folder / "saved")
    (folder / "images").mkdir()
    for index, name in enumerate(("first.png", "second.webp")):
        made_image(20 + index, Canvas(HEIGHT, WIDTH)).save(folder / "images" / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    size = ("--height", str(HEIGHT), "--width", str(WIDTH), "--prompts", folder / "prompts.txt")
    effort = ("--steps", "2", "--calibration-samples", "2", "--selection-samples", "2", "--held-out-samples", "1")
    images, formats = ("--images", folder / "images"), ("--formats", "fp8,bf16")
    build = ("build", "engine", folder / "saved", "--target", "sm120", *size, *effort, *formats, *images)
    assert CommandLine.here(*build, "--output", folder / "run") == 0
    return folder


def test_a_kontext_pipeline_goes_from_folder_to_engines(cli, folder: Path) -> None:
    files = BundleFiles.open(folder / "run")
    assert [plan.target for plan in files.manifest.plans if plan.bytes] != []
    assert files.manifest.image_inputs == ("image_latents",)
    ended = cli("check", folder / "run")
    assert ended.code == 0, ended.err


def test_an_image_of_the_users_is_drawn(cli, folder: Path, tmp_path: Path) -> None:
    sheets = []
    for name in ("first.png", "second.webp"):
        sheet = tmp_path / f"{name}.png"
        image = folder / "images" / name
        ended = cli("generate", folder / "run", "--samples", "1", "--prompt", "1", "--image", image, "--output", sheet)
        assert ended.code == 0, ended.err
        sheets.append(np.asarray(Image.open(sheet)))
    assert not np.array_equal(*sheets)


def test_the_unmodified_pipeline_draws_it_too(folder: Path) -> None:
    files, image = BundleFiles.open(folder / "run"), folder / "images" / "first.png"
    pipe = make_kontext_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part.eval()
    pipe.transformer = AdatsqTransformer.from_bundle(files.folder, pipe.scheduler)

    def pipelines(shown: Image.Image | None) -> np.ndarray:
        latents: torch.Tensor = pipe(
            image=shown,
            prompt=[PROMPTS[1]],
            height=HEIGHT,
            width=WIDTH,
            max_area=HEIGHT * WIDTH,
            _auto_resize=False,
            num_inference_steps=2,
            latents=torch.from_numpy(Bundle(files).noise([3])),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents.numpy()

    with Bundle(files) as bundle:
        noise, conditioning = bundle.noise([3]), bundle.conditioning([1], shown_image(files, image, None))
        wanted, full = bundle.denoise(noise, conditioning), bundle.denoise(noise, conditioning, quantized=False)
        held = bundle.denoise(noise, bundle.conditioning([1]), quantized=False)
    # The image that the bundle holds with this prompt is the other one.
    assert np.linalg.norm(held - full) > 3e-4 * np.linalg.norm(full)
    # What differs in its last bits may be rounded to neighbouring points of fp8.
    assert np.linalg.norm(pipelines(Image.open(image)) - wanted) < 2 * np.linalg.norm(wanted - full)
    with pytest.raises(
        MismatchError, match="12 of hidden_states and 12 of image_latents along axis 1; give the FluxKon"
    ):
        pipelines(None)
    with pytest.raises(MismatchError, match=f"an image of {HEIGHT}x{WIDTH} pixels, the picture's own size"):
        pipelines(Image.new("RGB", (2 * WIDTH, HEIGHT)))
    with pytest.raises(MismatchError, match="img_ids: got 24 image tokens, the bundle was exported for 4 x 3"):
        pipelines(Image.new("RGB", (HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "run"), "takes an image beside the prompt, and got none; pass --image FILE"),
        (("generate", "run", "--image", "images/first.png", "--mask", "images/first.png"), "--mask '"),
        (("deploy", "triton", "run", "--output", "repository"), "requests to the server carry none"),
        (("calibrate", "saved", "--images", "gone", "--output", "other"), "there is no such folder"),
        (("calibrate", "digits-flux", "--images", "images", "--output", "other"), "of the zoo is complete"),
    ],
)
def test_what_is_refused(cli, folder: Path, monkeypatch, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(folder)
    assert message in cli(*arguments).refusal
    assert not (folder / "other").exists()
    assert not (folder / "repository").exists()

"""Qwen-Image-Edit: prompts that are encoded with their images, beside tokens of these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.images import made_image
from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline
from adatsq_trt.checkpoints.objects import open_object
from adatsq_trt.errors import DependencyError, UserError
from adatsq_trt.models import qwen_image_edit
from adatsq_trt.models.family import Canvas
from adatsq_trt.models.qwen_image_edit import EditCondition, EditPlusCondition
from adatsq_trt.settings import PipelineSettings
from tests.tiny_qwen_image_edit import SIDE, make_edit_pipeline, make_edit_plus_pipeline

PROMPTS, NEGATIVE, STEPS, GUIDANCE = ("a red", "three green and seven", "seven"), "a green", 4, 4.0
CANVAS = Canvas(SIDE, SIDE)


def settings(folder: Path, **changes: Any) -> PipelineSettings:
    own = {"height": SIDE, "width": SIDE, "prompts": PROMPTS, "negative_prompt": NEGATIVE, **changes}
    return PipelineSettings(path=str(folder), **own)


def samples_of(opened: OpenedPipeline, encodings: dict[str, Tensor]) -> Samples:
    """Of the second prompt."""
    adapter = opened.load(encodings).adapter
    return Samples(adapter, adapter.schedule(STEPS), GUIDANCE, prompts=(1,), seeds=(4,))


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, of other sizes than the picture and of its shape, which the third prompt shares with the first."""
    folder = tmp_path_factory.mktemp("images")
    made_image(0, Canvas(96, 96)).save(folder / "a.png")
    made_image(1, Canvas(130, 128)).save(folder / "b.png")
    return folder


@pytest.mark.parametrize("make", [make_edit_pipeline, make_edit_plus_pipeline])
def test_the_loop_draws_what_the_pipeline_draws_of_an_image(
    tmp_path: Path, images: Path, make: Callable[[], Any]
) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    opened = open_pipeline(settings(tmp_path, images=str(images)))
    advanced = []
    encodings = opened.encode(lambda: advanced.append(1))
    assert len(advanced) == opened.encoded == 9
    samples = samples_of(opened, encodings)

    wanted: Tensor = pipe(
        image=Image.open(images / "b.png"),
        prompt=[PROMPTS[1]],
        negative_prompt=NEGATIVE,
        true_cfg_scale=GUIDANCE,
        num_inference_steps=STEPS,
        latents=samples.noise(),
        output_type="latent",
        return_dict=False,
    )[0]
    assert distance(trajectory(samples)[-1], wanted) < 1e-4
    # With another image's latents, prompt or negative prompt, each alone, it is another picture.
    tokens, latents = encodings["tokens"], encodings["image.image_latents"]
    for change in ({"image.image_latents": latents.roll(1, 0)}, {"tokens": tokens.roll(1, 0)}):
        assert distance(trajectory(samples_of(opened, {**encodings, **change}))[-1], wanted) > 3e-4
    shared = torch.cat([tokens[:3], tokens[3:4].expand(3, -1, -1)])
    assert distance(trajectory(samples_of(opened, {**encodings, "tokens": shared}))[-1], wanted) > 3e-4
    # The third prompt goes with the first image again.
    assert torch.equal(latents[2], latents[0])
    assert torch.equal(tokens[5], tokens[3])
    assert not torch.equal(tokens[4], tokens[3])


def test_a_pipeline_in_memory_encodes_the_same(tmp_path: Path) -> None:
    pipe = make_edit_pipeline()
    pipe.save_pretrained(tmp_path)
    few = settings(tmp_path, prompts=PROMPTS[:1])
    held, read = open_object(pipe, few), open_pipeline(few)
    got, wanted = (opened.encode(lambda: None) for opened in (held, read))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
    call = read.image_call
    assert call is not None
    assert (call.texts, call.negative_prompt) == (("encoder_hidden_states",), NEGATIVE)
    assert {name.split("/")[0] for name in call.files} == {"text_encoder", "tokenizer", "processor"}
    assert read.text_call is None


def test_sizes_that_the_pipeline_makes_others_of_are_refused(tmp_path: Path, images: Path) -> None:
    make_edit_pipeline().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="as large here; pass --height 1024 --width 1024"):
        open_pipeline(settings(tmp_path, height=512, width=512))
    made_image(2, Canvas(64, 96)).save(images / "c.png")
    try:
        message = r"c.png': the pipeline makes 832x1248 pixels of an image of 64x96, expected 1024x1024"
        with pytest.raises(UserError, match=message):
            open_pipeline(settings(tmp_path, images=str(images)))
        open_pipeline(settings(tmp_path, images=str(images), prompts=PROMPTS[:2]))  # which draws the first two
    finally:
        (images / "c.png").unlink()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1920, 1080), (1000, 1030), (3000, 1000), (80000, 16)])
def test_the_advised_size_is_one_that_can_be_drawn(size: tuple[int, int]) -> None:
    condition, asked = EditCondition(), Canvas(size[1], size[0])
    with pytest.raises(UserError, match=r"pass --height \d+ --width \d+$") as refused:
        condition.require_canvas(asked)
    _, height, _, width = str(refused.value).rsplit(maxsplit=3)
    advised = Canvas(int(height), int(width))
    condition.require_canvas(advised)
    condition.require_size("an image", (advised.width, advised.height), advised)


def test_encodings_without_their_images_are_refused(tmp_path: Path) -> None:
    make_edit_pipeline().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"--encodings '.*': the text encoder of a QwenImageEditPipeline sees the image"
    ):
        open_pipeline(settings(tmp_path, encodings=str(tmp_path / "encodings.safetensors")))


def test_a_processor_that_does_not_load_names_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_edit_pipeline().save_pretrained(tmp_path)
    parts = ["image_processor", "tokenizer", "video_processor"]
    monkeypatch.setattr(Qwen2VLProcessor, "get_attributes", classmethod(lambda cls: parts))
    monkeypatch.setattr(qwen_image_edit.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="QwenImageEditPipeline does not load without the library torchvision"):
        open_pipeline(settings(tmp_path))


def test_tokens_of_an_image_are_told_before_it_is_seen() -> None:
    """As many as Qwen2.5-VL's processor makes of it, which decide how much memory and disk encodings take."""
    height, width = smart_resize(1024, 1024, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280 * 4)
    assert EditCondition().seen_tokens(Canvas(1024, 1024)) == height // 28 * (width // 28)
    assert EditPlusCondition().seen_tokens(Canvas(1024, 1024)) == (384 // 28 + 1) ** 2

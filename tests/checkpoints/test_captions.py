"""Z-Image's captions of different lengths, in one batch and beside the empty prompt, as the pipeline treats them."""

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.errors import UserError
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

SHORT, LONG = "a red three and seven", " ".join(["green seven and a red"] * 26)


def test_the_loop_ends_in_the_pipelines_latents_for_long_and_short_captions(saved_z_image: Path) -> None:
    settings = PipelineSettings(path=str(saved_z_image), height=HEIGHT, width=WIDTH, prompts=(SHORT, LONG))
    opened, steps, guidance = open_pipeline(settings), 2, 6.0
    encodings = encode_prompts(opened.source, settings.prompts, lambda: None)
    used = (encodings["tokens"].abs().amax(-1) > 0).sum(1)
    assert used.max() > 128 > 32 >= used[0]  # the empty prompt is last
    adapter = opened.load(encodings).adapter
    samples = Samples(adapter, adapter.schedule(steps), guidance, prompts=(0, 1), seeds=(4, 5))
    pipe = ZImagePipeline.from_pretrained(saved_z_image, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [SHORT, LONG],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        latents=samples.noise(),
        output_type="latent",
    ).images
    torch.testing.assert_close(trajectory(samples)[-1], expected, atol=1e-4, rtol=1e-3)


def test_a_negative_prompt_is_the_pipelines(saved_z_image: Path) -> None:
    """Of any length; the digest of the model knows it, and without one it is what it was."""
    settings = PipelineSettings(path=str(saved_z_image), height=HEIGHT, width=WIDTH, prompts=(SHORT,))
    own = settings.model_copy(update={"negative_prompt": LONG})
    opened, steps, guidance = open_pipeline(own), 2, 6.0
    assert opened.model_sha256 != open_pipeline(settings).model_sha256
    adapter = opened.load(opened.encode(lambda: None)).adapter
    samples = Samples(adapter, adapter.schedule(steps), guidance, prompts=(0,), seeds=(4,))
    pipe = ZImagePipeline.from_pretrained(saved_z_image, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": steps, "guidance_scale": guidance - 1}
    both = [
        pipe([SHORT], negative_prompt=[text], latents=samples.noise(), output_type="latent", **options).images
        for text in (LONG, "")
    ]
    ours = trajectory(samples)[-1]
    assert (ours - both[0]).norm() < 1e-4 * both[0].norm()
    assert (ours - both[1]).norm() > 1e-2 * both[1].norm()


@pytest.mark.parametrize("family", ["saved_flux", "saved_z_image"])
def test_a_negative_prompt_without_a_second_branch_is_refused(request: pytest.FixtureRequest, family: str) -> None:
    settings = PipelineSettings(
        path=str(request.getfixturevalue(family)), height=HEIGHT, width=WIDTH, prompts=(SHORT,), guided=False
    )
    with pytest.raises(UserError, match="--negative-prompt 'a red': guidance takes no second branch here") as refused:
        open_pipeline(settings.model_copy(update={"negative_prompt": "a red"}))
    assert refused.value.exit_code == 2

"""Unmodified pipelines of Z-Image and Wan, with their own text encoders and a bundle in the transformer's place."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional

from adatsq_trt.engines.runtime import Conditioning
from adatsq_trt.engines.step_clock import find_step
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from tests.engines.bundled_pipelines import KINDS, LENGTH, TEXT, make_bundled
from tests.tiny_bundle import STEPS
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline


@dataclass(frozen=True)
class Case:
    """A pipeline with a bundle in it.

    Attributes:
        pipe: the pipeline.
        request: arguments of its call beside the usual ones.
    """

    pipe: DiffusionPipeline
    request: dict[str, object]

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """What the pipeline's text encoder makes of prompts, filled up with zeros to the bundle's length."""
        encoded, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        rows = [functional.pad(tokens, (0, 0, 0, LENGTH - len(tokens))) for tokens in encoded]
        return {"encoder_hidden_states": torch.stack(rows).numpy()}

    def run(self, noise: np.ndarray, **changes: object) -> np.ndarray:
        request = {
            "prompt": list(TEXT),
            "latents": torch.from_numpy(noise),
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": STEPS,
            "max_sequence_length": LENGTH,
            "output_type": "latent",
            "return_dict": False,
            **self.request,
            **changes,
        }
        output: Tensor = self.pipe(**request)[0]
        return output.numpy()


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    pipe, files = make_bundled(request.param, tmp_path_factory.mktemp(request.param) / "bundle")
    pipe.transformer = AdatsqTransformer.from_bundle(files.folder)
    pipe.scheduler = pipe.transformer.scheduler
    return Case(pipe, KINDS[request.param][-1])


def test_a_guided_pipeline_gives_what_the_bundles_own_loop_gives(case: Case) -> None:
    bundle = case.pipe.transformer.bundle
    noise = bundle.noise([1, 2])
    condition = Conditioning(case.condition(list(TEXT)), case.condition(["", ""]))
    wanted, got = bundle.denoise(noise, condition), case.run(noise)
    assert np.std(wanted - noise) > 0.01
    # The pipelines combine the guidance branches in another order, and Wan's calls the transformer for each. UniPC
    # writes its step by x0; inputs that differ in their last bits may be rounded to neighbouring points of fp8.
    limit = 1e-3 if isinstance(case.pipe.scheduler, UniPCMultistepScheduler) else 1e-4
    assert np.linalg.norm(got - wanted) < limit * np.linalg.norm(wanted - noise)
    other = bundle.denoise(noise, Conditioning(case.condition(TEXT[::-1]), condition.unconditional))
    assert np.linalg.norm(other - wanted) > 1e-2 * np.linalg.norm(wanted - noise)


def test_formats_follow_the_timestep(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, steps = case.pipe.transformer.bundle, []
    predict = bundle.predict
    monkeypatch.setattr(bundle, "predict", lambda step, inputs, size: steps.append(step) or predict(step, inputs))
    case.run(bundle.noise([1, 2]))
    assert sorted(set(steps)) == list(range(STEPS))
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": STEPS + 1}, "call the pipeline with num_inference_steps=4"),
        ({"height": 2 * HEIGHT, "latents": None}, "call the pipeline with that size"),
    ],
)
def test_requests_that_the_bundle_was_not_made_for(case: Case, changes: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        case.run(case.pipe.transformer.bundle.noise([1, 2]), **changes)


@pytest.mark.parametrize("case", ["z-image"], indirect=True)
def test_a_caption_that_is_too_long(case: Case) -> None:
    with pytest.raises(MismatchError, match=r"got 40 tokens.*max_sequence_length=32"):
        case.run(case.pipe.transformer.bundle.noise([1]), prompt=["red " * 40], max_sequence_length=40)


@pytest.mark.parametrize("case", ["wan"], indirect=True)
def test_another_scheduler_than_the_bundles_is_refused(case: Case) -> None:
    own = make_wan_pipeline().scheduler
    bundled, case.pipe.scheduler = case.pipe.scheduler, own
    try:
        with pytest.raises(MismatchError, match="the scheduler that the bundle was built with"):
            case.run(case.pipe.transformer.bundle.noise([1, 2]))
    finally:
        case.pipe.scheduler = bundled


@pytest.mark.parametrize("case", ["wan-unipc"], indirect=True)
def test_a_wan_may_keep_the_scheduler_that_it_comes_with(case: Case) -> None:
    """Its sigmas are the bundle's; it combines the predictions of several steps, so the latents are near, not equal."""
    noise = case.pipe.transformer.bundle.noise([1, 2])
    euler = case.run(noise)
    bundled, case.pipe.scheduler = case.pipe.scheduler, make_wan_pipeline().scheduler
    try:
        own = case.run(noise)
    finally:
        case.pipe.scheduler = bundled
    assert 1e-2 < np.linalg.norm(own - euler) / np.linalg.norm(euler - noise) < 0.3


@pytest.mark.parametrize("case", ["wan-unipc"], indirect=True)
def test_steps_that_have_the_same_timestep_cannot_be_told_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Karras' sigmas, whose timesteps UniPC rounds to whole numbers, have for many steps."""
    files = case.pipe.transformer.bundle.files
    schedule = files.schedule()
    same = replace(schedule, timesteps=(schedule.timesteps[0],) * 2 + schedule.timesteps[2:])
    monkeypatch.setattr(type(files), "schedule", lambda self, size=None: same)
    with pytest.raises(MismatchError, match="two of the bundle's 4 steps have the same timestep"):
        find_step(np.asarray([0.9]), files.schedule())

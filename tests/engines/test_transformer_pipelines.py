"""Unmodified pipelines of Z-Image, Wan and Qwen-Image, with their own text encoders and a bundle in them."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional

from adatsq_trt.engines.bundle import write_manifest
from adatsq_trt.engines.manifest import ScheduleRecord
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.step_clock import StepClock
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from adatsq_trt.schedule import Spacing, make_schedule
from tests.engines.bundled_pipelines import KINDS, LENGTH, SCHEDULERS, TEXT, make_bundled
from tests.tiny_bundle import STEPS
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline


@dataclass(frozen=True)
class Case:
    """A pipeline with a bundle in it.

    Attributes:
        name: one of `KINDS`.
        pipe: the pipeline.
        request: arguments of its call beside the usual ones.
    """

    name: str
    pipe: DiffusionPipeline
    request: dict[str, object]

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """What the pipeline's text encoder makes of prompts, filled up with zeros to the bundle's length."""
        options = {} if self.name == "qwen-image" else {"do_classifier_free_guidance": False}
        encoded, _ = self.pipe.encode_prompt(prompts, max_sequence_length=LENGTH, **options)
        rows = [functional.pad(tokens, (0, 0, 0, LENGTH - len(tokens))) for tokens in encoded]
        return {"encoder_hidden_states": torch.stack(rows).numpy()}

    def run(self, noise: np.ndarray, **changes: object) -> np.ndarray:
        request = {
            "prompt": list(TEXT),
            "latents": torch.from_numpy(noise),
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": self.pipe.transformer.bundle.schedule.pipeline_steps,
            "max_sequence_length": LENGTH,
            "output_type": "latent",
            "return_dict": False,
            **self.request,
            **changes,
        }
        if self.name == "qwen-image":  # which guides only then
            request.setdefault("negative_prompt", ["" for _ in request.get("prompt") or TEXT])
        output: Tensor = self.pipe(**request)[0]
        return output.numpy()


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    pipe, files = make_bundled(request.param, tmp_path_factory.mktemp(request.param) / "bundle")
    pipe.transformer = AdatsqTransformer.from_bundle(files.folder)
    pipe.scheduler = pipe.transformer.scheduler
    return Case(request.param, pipe, KINDS[request.param][-1])


def test_a_guided_pipeline_gives_what_the_bundles_own_loop_gives(case: Case) -> None:
    bundle = case.pipe.transformer.bundle
    noise = bundle.noise([1, 2])
    condition = Conditioning(case.condition(list(TEXT)), case.condition(["", ""]))
    wanted, got = bundle.denoise(noise, condition), case.run(noise)
    assert np.std(wanted - noise) > 0.01
    # The pipelines combine the guidance branches in another order, and Wan's calls the transformer for each. UniPC
    # writes its step by x0; inputs that differ in their last bits may be rounded to neighbouring points of fp8.
    limit = 1e-4 if case.name in ("z-image", "wan", "qwen-image") else 1e-3
    assert np.linalg.norm(got - wanted) < limit * np.linalg.norm(wanted - noise)
    other = bundle.denoise(noise, Conditioning(case.condition(TEXT[::-1]), condition.unconditional))
    assert np.linalg.norm(other - wanted) > 1e-2 * np.linalg.norm(wanted - noise)


def test_formats_follow_the_timestep(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, steps = case.pipe.transformer.bundle, []
    predict = bundle.predict
    monkeypatch.setattr(bundle, "predict", lambda step, inputs, size: steps.append(step) or predict(step, inputs))
    case.run(bundle.noise([1, 2]))
    assert sorted(set(steps)) == list(range(bundle.policy.steps))
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": STEPS + 1}, "call the pipeline with num_inference_steps="),
        ({"height": 2 * HEIGHT, "latents": None}, "call the pipeline with that (size|height and width)"),
    ],
)
def test_requests_that_the_bundle_was_not_made_for(case: Case, changes: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        case.run(case.pipe.transformer.bundle.noise([1, 2]), **changes)


@pytest.mark.parametrize("case", ["z-image"], indirect=True)
def test_a_bundle_with_noise_levels_of_its_own(case: Case, tmp_path: Path) -> None:
    """A pipeline that is called with these has its steps; with others it is told which."""
    sigmas = (1.0, 0.8, 0.45, 0.2)
    before = case.pipe.transformer.bundle
    schedule = make_schedule(before.schedule.scheduler(), Spacing("sigmas", sigmas), image_tokens=1)
    record = ScheduleRecord.of(schedule)
    folder = Path(shutil.copytree(before.files.folder, tmp_path / "bundle"))
    write_manifest(folder, before.manifest.model_copy(update={"schedule": record}))
    own = AdatsqTransformer.from_bundle(folder, case.pipe.scheduler)
    assert own.bundle.schedule == schedule
    noise, condition = before.noise([1, 2]), Conditioning(case.condition(list(TEXT)), case.condition(["", ""]))
    pipe = type(case.pipe)(**{**case.pipe.components, "transformer": own})
    pipe.set_progress_bar_config(disable=True)
    listed = replace(case, pipe=pipe)
    wanted, got = own.bundle.denoise(noise, condition), listed.run(noise, sigmas=list(sigmas))
    # Guidance is summed in another order, and what differs in its last bits may be rounded to another point of fp8.
    assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted - noise)
    for others in ({}, {"sigmas": [1.0, 0.7, 0.45, 0.2]}):
        with pytest.raises(MismatchError, match=r"call the pipeline with sigmas=\[1.0, 0.8, 0.45, 0.2\]"):
            listed.run(noise, **others)
    with pytest.raises(MismatchError, match="call the pipeline with num_inference_steps=4"):
        case.run(noise, sigmas=list(sigmas))


@pytest.mark.parametrize("case", ["z-image", "qwen-image"], indirect=True)
def test_a_caption_that_is_too_long(case: Case) -> None:
    with pytest.raises(MismatchError, match=r"got 40 tokens.*max_sequence_length=32"):
        case.run(case.pipe.transformer.bundle.noise([1]), prompt=["red " * 40], max_sequence_length=40)


@pytest.mark.parametrize("case", ["qwen-image"], indirect=True)
def test_texts_behind_a_mask(case: Case) -> None:
    """Texts of the user's own: what the mask leaves out may be anything, and must be behind the text."""
    noise, (first, second) = case.pipe.transformer.bundle.noise([1, 2]), (torch.from_numpy(x) for x in _texts(case))
    given = {"prompt": None, "negative_prompt": None, "negative_prompt_embeds": second}
    mask = (first.abs().amax(-1) > 0).long()
    wanted = case.run(noise, prompt_embeds=first, prompt_embeds_mask=mask, **given)
    np.testing.assert_array_equal(wanted, case.run(noise))
    other = torch.where(mask[..., None] > 0, first, torch.ones(()))
    np.testing.assert_array_equal(case.run(noise, prompt_embeds=other, prompt_embeds_mask=mask, **given), wanted)
    longer = case.pipe.transformer(**_call(case, first[1:2], mask[1:2]), return_dict=False)[0]
    filled, seen = functional.pad(first[1:2], (0, 0, 0, 40), value=3.0), functional.pad(mask[1:2], (0, 40))
    assert torch.equal(case.pipe.transformer(**_call(case, filled, seen), return_dict=False)[0], longer)
    with pytest.raises(MismatchError, match="encoder_hidden_states: got 33 tokens, the bundle was exported for 32"):
        case.pipe.transformer(**_call(case, filled, (torch.arange(filled.shape[1]) < 33)[None]))
    holes = mask.clone()
    holes[1, 1] = 0
    for tokens, seen, message in (
        (first, None, r"encoder_hidden_states_mask: row 0 has 18 tokens, .* zeros from place 9 on"),
        (first, holes, "encoder_hidden_states_mask: row 1 has 17 tokens, the last in place 18"),
    ):
        with pytest.raises(MismatchError, match=message):
            case.run(noise, prompt_embeds=tokens, prompt_embeds_mask=seen, **given)


def _call(case: Case, tokens: Tensor, mask: Tensor) -> dict[str, object]:
    """Arguments of Qwen-Image's transformer for one row at the first step."""
    return {
        "hidden_states": torch.from_numpy(case.pipe.transformer.bundle.noise([1])),
        "encoder_hidden_states": tokens,
        "encoder_hidden_states_mask": mask,
        "timestep": torch.ones(1),
        "img_shapes": [[(1, HEIGHT // 16, WIDTH // 16)]],
    }


@pytest.mark.parametrize("case", ["wan"], indirect=True)
def test_channels_behind_the_latents_are_zero(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HunyuanVideo-1.5 has them for an image that it is not shown."""
    transformer = case.pipe.transformer
    latents = torch.from_numpy(transformer.bundle.noise([1]))
    text = torch.from_numpy(case.condition(TEXT[:1])["encoder_hidden_states"])
    rest = {"timestep": torch.tensor(transformer.bundle.schedule.timesteps[:1]), "encoder_hidden_states": text}
    wanted = transformer(latents, **rest, return_dict=False)[0]
    call = transformer.call.model_copy(update={"zeros_behind": {"hidden_states": 5}})
    monkeypatch.setattr(transformer, "call", call)
    behind = torch.zeros(1, 5, *latents.shape[2:])
    assert torch.equal(transformer(torch.cat([latents, behind], dim=1), **rest, return_dict=False)[0], wanted)
    behind[0, 4, 0, 0, 0] = 0.5
    for given in (torch.cat([latents, behind], dim=1), latents[:, :5]):
        with pytest.raises(MismatchError, match=r"hidden_states: got .* expected 5 channels of zeros at the end"):
            transformer(given, **rest)


def _texts(case: Case) -> list[np.ndarray]:
    """Conditional and unconditional, as long as the longest text."""
    texts = [case.condition(prompts)["encoder_hidden_states"] for prompts in (list(TEXT), ["", ""])]
    return [rows[:, : (np.abs(rows).max(axis=(0, 2)) > 0).sum()] for rows in texts]


@pytest.mark.parametrize("case", ["qwen-image"], indirect=True)
def test_rows_of_several_images_are_refused(case: Case) -> None:
    transformer, (text, _) = case.pipe.transformer, _texts(case)
    grid = (1, HEIGHT // 16, WIDTH // 16)
    latents = torch.from_numpy(transformer.bundle.noise([1]))
    for grids in ([[grid, grid]], [[(1, *grid[:0:-1])]], []):
        with pytest.raises(
            MismatchError, match=r"img_shapes: got .* exported for one image of 4 x 3 tokens in each row"
        ):
            transformer(latents, torch.from_numpy(text[1:]), timestep=torch.ones(1), img_shapes=grids)
    # With tokens of an image behind the picture's there are two of one size.
    joined = transformer.call.model_copy(update={"joined": {"hidden_states": 1}})
    beside = AdatsqTransformer(transformer.bundle, joined)
    assert beside._shape_of_grids([[grid, grid]]).image.shape.grid == grid[1:]
    for grids in ([grid], [[grid, (1, *grid[:0:-1])]], [[grid] * 3]):
        with pytest.raises(MismatchError, match="exported for a picture and one image, each of 4 x 3 tokens"):
            beside._shape_of_grids(grids)


@pytest.mark.parametrize("case", ["wan"], indirect=True)
def test_another_scheduler_than_the_bundles_is_refused(case: Case) -> None:
    own = make_wan_pipeline().scheduler
    bundled, case.pipe.scheduler = case.pipe.scheduler, own
    try:
        with pytest.raises(MismatchError, match="the scheduler that the bundle was built with"):
            case.run(case.pipe.transformer.bundle.noise([1, 2]))
    finally:
        case.pipe.scheduler = bundled


@pytest.mark.parametrize("case", ["wan-unipc", "wan-heun"], indirect=True)
def test_a_pipeline_keeps_its_own_scheduler(case: Case) -> None:
    """Which combines the predictions of several steps, as the bundle's loop does."""
    noise = case.pipe.transformer.bundle.noise([1, 2])
    bundles = case.run(noise)
    name, options = SCHEDULERS[case.name]
    own = getattr(diffusers, name)(**options)
    bundled, case.pipe.scheduler = case.pipe.scheduler, own
    try:
        np.testing.assert_array_equal(case.run(noise), bundles)
        assert AdatsqTransformer.from_bundle(case.pipe.transformer.bundle, scheduler=own).bundle is not None
    finally:
        case.pipe.scheduler = bundled


@pytest.mark.parametrize("case", ["wan-unipc"], indirect=True)
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "scheduler is a FlowMatchEulerDiscrete.* the bundle's a UniPC"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "has solver_order = 3, the bundle's 2"),
        ("UniPCMultistepScheduler", {"flow_shift": 5.0}, "has flow_shift = 5.0, the bundle's 3.0"),
    ],
)
def test_a_scheduler_that_is_shown_and_is_another_is_refused_with_both_values(
    case: Case, name: str, changes: dict[str, object], message: str
) -> None:
    own = SCHEDULERS["wan-unipc"][1] if name == "UniPCMultistepScheduler" else {}
    with pytest.raises(MismatchError, match=message) as refused:
        AdatsqTransformer.from_bundle(case.pipe.transformer.bundle, getattr(diffusers, name)(**{**own, **changes}))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("case", ["wan-unipc"], indirect=True)
def test_a_scheduler_of_another_diffusers_is_refused_with_both_versions(case: Case) -> None:
    files, scheduler = case.pipe.transformer.bundle.files, case.pipe.scheduler
    older = files.manifest.model_copy(update={"versions": {"diffusers": "0.41.0"}})
    bundle = Bundle(replace(files, manifest=older))
    with pytest.raises(MismatchError, match=f"this is diffusers {diffusers.__version__}, .* built with 0.41.0"):
        AdatsqTransformer.from_bundle(bundle, scheduler)
    assert AdatsqTransformer.from_bundle(bundle).bundle is bundle


@pytest.mark.parametrize("case", ["wan-unipc"], indirect=True)
def test_steps_that_have_the_same_timestep_are_told_by_their_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Karras' sigmas, whose timesteps UniPC rounds to whole numbers, have for many steps."""
    schedule = case.pipe.transformer.bundle.schedule
    same = replace(schedule, timesteps=(schedule.timesteps[0],) * 2 + schedule.timesteps[2:])
    clock, steps = StepClock(), []
    times = [torch.full((2,), same.model_time(step)) for step in range(same.steps)]
    with pytest.raises(MismatchError, match="two of the bundle's 4 steps have the same timestep"):
        clock.step(times[0], same)
    for time in times:
        for branch in ("cond", "uncond"):
            clock.enter(branch)
            steps.append(clock.step(time, same))
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]

"""Every option of a scheduler is followed as the pipeline follows it, has no effect, or is refused by name."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.checkpoints.schedulers import OPTIONS
from adatsq_trt.errors import UserError
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.schedule import EULER, UNIPC, make_schedule
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

PROMPTS = ("a red", "three green and seven")
FOLDERS = {EULER: "saved_flux", UNIPC: "saved_wan"}
# Another value than the default, for each option that is followed.
OTHERS: dict[str, dict[str, Any]] = {
    EULER: {
        "shift": 2.5,
        "use_dynamic_shifting": False,
        "base_shift": 0.7,
        "max_shift": 1.6,
        "base_image_seq_len": 6,
        "max_image_seq_len": 64,
        "time_shift_type": "linear",
        "shift_terminal": 0.1,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
    },
    UNIPC: {
        "flow_shift": 5.0,
        "shift_terminal": 0.1,
        "use_karras_sigmas": True,
        # Of Karras' sigmas.
        "sigma_min": 0.1,
        "sigma_max": 20.0,
        "beta_start": 0.0002,
        "beta_end": 0.01,
        "beta_schedule": "scaled_linear",
        "trained_betas": [0.001 + 0.00001 * i for i in range(1000)],
        "rescale_betas_zero_snr": True,
    },
}
KARRAS = {
    "sigma_min",
    "sigma_max",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
}


def options(name: str) -> dict[str, Any]:
    """Options of diffusers' class and their defaults, as the installed diffusers has them."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_the_class_is_in_one_list(name: str) -> None:
    known = OPTIONS[name]
    lists = [known.followed, known.idle, frozenset(known.required)]
    assert sorted(option for members in lists for option in members) == sorted(options(name))
    assert set(OTHERS[name]) == known.followed


def edited(request: pytest.FixtureRequest, name: str, tmp_path: Path, **changes: object) -> Path:
    """A pipeline with such a scheduler, some of whose options are changed."""
    folder = Path(shutil.copytree(request.getfixturevalue(FOLDERS[name]), tmp_path / "pipeline"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def outline(folder: Path, **changes: object) -> ModelAdapter:
    settings = PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, prompts=PROMPTS)
    return open_pipeline(settings.model_copy(update=changes)).outline.adapter


def pipelines_own(folder: Path, steps: int) -> Any:
    """The scheduler with the steps that the folder's pipeline takes."""
    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index["scheduler"][1])
    scheduler = kind.from_pretrained(folder / "scheduler", local_files_only=True)
    if index["_class_name"] == "WanPipeline":
        scheduler.set_timesteps(steps)
        return scheduler
    tokens, c = HEIGHT // 16 * WIDTH // 16, scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    retrieve_timesteps(scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in sorted(OTHERS[name])])
def test_options_that_are_followed_give_the_pipelines_own_steps(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, option: str
) -> None:
    changes = {option: OTHERS[name][option]} | ({"use_karras_sigmas": True} if option in KARRAS else {})
    if option == "shift":
        changes["use_dynamic_shifting"] = False
    folder = edited(request, name, tmp_path, **changes)
    before = outline(edited(request, name, tmp_path / "before", **{k: v for k, v in changes.items() if k != option}))
    schedule, expected = outline(folder).schedule(5), pipelines_own(folder, 5)
    assert schedule.sigmas == tuple(expected.sigmas.tolist())
    assert schedule.timesteps == tuple(map(float, expected.timesteps))
    assert schedule.sigmas != before.schedule(5).sigmas  # the option does something


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name].required])
def test_options_that_are_not_followed_are_named(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, option: str
) -> None:
    others = {
        "num_train_timesteps": 500,
        "prediction_type": "epsilon",
        "final_sigmas_type": "sigma_min",
        "solver_p": "x",
    }
    wanted = OPTIONS[name].required[option]
    folder = edited(request, name, tmp_path, **{option: others.get(option, not wanted)})
    with pytest.raises(UserError, match=rf"{name} with {option} = .* is not followed, expected {wanted!r}") as refused:
        outline(folder)
    assert refused.value.exit_code == 2


def test_the_flag_that_a_flux_pipeline_looks_at_itself(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What is left of a UniPC has FluxPipeline ask the scheduler for its own spacing."""
    with pytest.raises(UserError, match="use_flow_sigmas = True is not followed"):
        outline(edited(request, EULER, tmp_path, use_flow_sigmas=True))


def test_what_is_left_of_another_class_has_no_effect(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As diffusers writes it where a scheduler was converted; an option of no class we know may mean something."""
    folder = edited(request, UNIPC, tmp_path)
    own = UniPCMultistepScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    converted = FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=4.0)
    converted.save_pretrained(folder / "scheduler")
    assert "prediction_type" in json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    converted.set_timesteps(6)
    assert outline(folder).schedule(6).sigmas == tuple(converted.sigmas.tolist())
    with pytest.raises(UserError, match="of the installed diffusers has no option 'use_warped_sigmas'"):
        outline(edited(request, UNIPC, tmp_path / "new", use_warped_sigmas=True))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (EULER, {"time_shift_type": "cubic"}, "does not describe a scheduler"),
        (EULER, {"shift": "three", "use_dynamic_shifting": False}, "does not describe a scheduler"),
        (EULER, {"base_shift": None}, "gives no schedule of 28 steps"),
        (EULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
        (UNIPC, {"_class_name": "DDIMScheduler"}, f"expected {EULER} or {UNIPC}; save the pipeline with one of these"),
        (UNIPC, {"flow_shift": None}, "gives no schedule of 50 steps"),
        (UNIPC, {"flow_shift": 0.0}, "expected one that falls"),
    ],
)
def test_configurations_that_make_no_steps(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        outline(edited(request, name, tmp_path, **changes))


@pytest.mark.parametrize("steps", [1, 2, 8, 25, 50, 100])
def test_wans_sigmas_are_those_of_unipc(saved_wan: Path, steps: int) -> None:
    schedule = outline(saved_wan).schedule(steps)
    own = UniPCMultistepScheduler.from_pretrained(saved_wan / "scheduler", local_files_only=True)
    own.set_timesteps(steps)
    assert schedule.sigmas == tuple(own.sigmas.tolist())
    assert schedule.timesteps == tuple(map(float, own.timesteps))


def test_more_steps_than_unipc_has_are_refused() -> None:
    """Below sigma 1/1000 its timestep is 0."""
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=0.05)
    with pytest.raises(UserError, match="timestep is 0, expected more than 0; pass fewer --steps"):
        make_schedule(scheduler, 1000)


@pytest.mark.parametrize("solver", ["bh1", "bh2", "midpoint"])
def test_the_scheduler_of_a_schedule_takes_eulers_steps_with_every_solver(solver: str) -> None:
    """To the last, to sigma 0, where one of UniPC's own types of solver gives NaN."""
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_type=solver)
    schedule = make_schedule(unipc, 4)
    scheduler = schedule.scheduler()
    scheduler.set_timesteps(4)
    latent = wanted = torch.linspace(-1, 1, 5)
    for step, time in enumerate(scheduler.timesteps):
        latent = scheduler.step(torch.sin(latent), time, latent, return_dict=False)[0]
        wanted = wanted + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * torch.sin(wanted)
    torch.testing.assert_close(latent, wanted, atol=1e-4, rtol=1e-3)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("steps", [8, 25])
def test_latents_are_nearer_to_unipcs_than_those_of_eulers_own_grid(saved_wan: Path, steps: int) -> None:
    """At shift 3; Euler's own grid shifts its smallest sigma twice, so its last step is nearly wasted."""
    settings = PipelineSettings(path=str(saved_wan), height=HEIGHT, width=WIDTH, frames=5, prompts=PROMPTS)
    opened = open_pipeline(settings)
    adapter = opened.load(encode_prompts(opened.source, PROMPTS, lambda: None)).adapter
    samples = Samples(adapter, adapter.schedule(steps), 4.0, prompts=(1, 0), seeds=(4, 5))

    def latents(scheduler: object) -> torch.Tensor:
        pipe = DiffusionPipeline.from_pretrained(
            saved_wan, local_files_only=True, **({"scheduler": scheduler} if scheduler else {})
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            [PROMPTS[1], PROMPTS[0]],
            height=HEIGHT,
            width=WIDTH,
            num_frames=5,
            num_inference_steps=steps,
            guidance_scale=4.0,
            latents=samples.noise(),
            output_type="latent",
        ).frames

    ours, wanted = trajectory(samples)[-1], latents(None)
    assert distance(ours, wanted) < 0.6 * distance(latents(FlowMatchEulerDiscreteScheduler(shift=3.0)), wanted)
    # The scheduler that a bundle describes takes the very same steps.
    torch.testing.assert_close(latents(samples.schedule.scheduler()), ours, atol=1e-4, rtol=1e-3)

"""Lists in the place of a number of steps: taken where the pipeline takes them, else refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.models import families
from adatsq_trt.models.stable_diffusion_3 import StableDiffusion3Adapter, StableDiffusion3Family
from adatsq_trt.schedule import Schedule, Spacing, make_schedule
from adatsq_trt.settings import Settings
from adatsq_trt.stages.models import OpenedModel
from adatsq_trt.stages.resolve import open_and_resolve
from tests.stages.tiny_run import tiny_context
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_fill_pipeline, make_flux_pipeline, make_wan_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SIGMAS = (1.0, 0.85, 0.6, 0.15)
SMALL = {"height": HEIGHT, "width": WIDTH, "prompts": ("a red",), "target": "cpu"}


def resolve(model: object, **choices: Any) -> tuple[OpenedModel, Settings]:
    own = {"target": "cpu"} if model == "digits-flux" else SMALL
    return open_and_resolve(model, BuildConfig(**own, **choices), "bundle")


@pytest.mark.parametrize("given", ["1,0.85,0.6,0.15", SIGMAS, list(SIGMAS)])
def test_a_list_says_how_many_steps_there_are(given: object) -> None:
    opened, settings = resolve("digits-flux", sigmas=given)
    assert (settings.steps, settings.sigmas, settings.asked_steps) == (4, SIGMAS, Spacing("sigmas", SIGMAS))
    schedule = opened.outline.adapter.schedule(settings.asked_steps)
    assert (schedule.steps, schedule.spacing) == (4, settings.asked_steps)
    assert schedule.sigmas != opened.outline.adapter.schedule(4).sigmas
    assert resolve("digits-flux", sigmas=given, steps=4)[1] == settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"sigmas": SIGMAS, "steps": 8}, r"--steps 8: --sigmas has 4 numbers"),
        ({"sigmas": SIGMAS, "timesteps": (1000,)}, "--sigmas and --timesteps: expected one of them"),
        ({"sigmas": (0.5, 0.75)}, "--sigmas .* expected numbers that fall"),
        ({"timesteps": (1000, 500)}, "--timesteps: FluxPipeline has no such argument, .* pass --sigmas instead"),
    ],
)
def test_options_that_do_not_go_together(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        resolve("digits-flux", **choices)
    assert refused.value.exit_code == 2


def saved(pipe: DiffusionPipeline, folder: Path, scheduler: SchedulerMixin | None = None) -> Path:
    """The folder of a pipeline, with another scheduler if one is given."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "scheduler", "message"),
    [
        (make_wan_pipeline, None, "--sigmas: WanPipeline has no such argument, .* pass --steps instead"),
        # FluxPipeline takes them, and drops them where the scheduler has sigmas of a flow.
        (make_flux_pipeline, UniPCMultistepScheduler(**FLOW), "scheduler UniPCMultistepScheduler, .* ignores them"),
        (
            make_stable_diffusion_3_pipeline,
            DPMSolverMultistepScheduler(**FLOW),
            "--sigmas: the scheduler DPMSolverMultistepScheduler takes none",
        ),
        # Lists of few steps are often made for this one, which draws noise in every step.
        (
            make_flux_pipeline,
            FlowMatchLCMScheduler(),
            "got the scheduler FlowMatchLCMScheduler, expected FlowMatchEuler",
        ),
    ],
)
def test_what_takes_no_list_is_named(
    tmp_path: Path, make: Callable[[], DiffusionPipeline], scheduler: SchedulerMixin | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(saved(make(), tmp_path, scheduler), sigmas=SIGMAS)


def test_fill_begins_with_noise_alone(tmp_path: Path) -> None:
    """Its pipeline mixes the image in where the first noise level is below 1."""
    own = saved(make_fill_pipeline(), tmp_path / "own")
    assert resolve(own, sigmas=SIGMAS)[1].steps == 4
    with pytest.raises(UserError, match=r"sigma 0\.9.*FluxFillPipeline begins with a part of its image"):
        resolve(own, sigmas=(0.9, 0.5))
    # Which keeps clear of the noise level 1 by a millionth.
    assert resolve(saved(make_fill_pipeline(), tmp_path / "unipc", UniPCMultistepScheduler(**FLOW)))[1].steps == 50


class TimedPipeline(StableDiffusion3Pipeline):
    """A pipeline of one's own whose call takes timesteps."""

    def __call__(self, *args: Any, timesteps: list[float] | None = None, **named: Any) -> Any:
        set_timesteps = self.scheduler.set_timesteps
        if timesteps is not None:
            self.scheduler.set_timesteps = lambda *_, device, **__: set_timesteps(timesteps=timesteps, device=device)
        return super().__call__(*args, **named)


class TimedFamily(StableDiffusion3Family):
    """Its family."""

    pipeline = "TimedPipeline"

    def load_pipeline_class(self) -> Any:
        return TimedPipeline


def test_timesteps_are_for_a_pipeline_that_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", [*families.families()])
    families.register_family(TimedFamily())
    pipe = make_stable_diffusion_3_pipeline()
    folder = saved(TimedPipeline(**pipe.components), tmp_path)
    opened, settings = resolve(folder, timesteps="1000,700,200")
    assert (settings.steps, settings.timesteps, settings.sigmas) == (3, (1000.0, 700.0, 200.0), ())
    schedule = opened.outline.adapter.schedule(settings.asked_steps)
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own.set_timesteps(timesteps=[1000, 700, 200])
    assert schedule.timesteps == (1000.0, 700.0, 200.0)
    assert schedule.sigmas == tuple(own.sigmas.tolist())
    assert schedule.pipeline_argument == {"timesteps": [1000.0, 700.0, 200.0]}


class CountingAdapter(StableDiffusion3Adapter):
    """An adapter of one's own that computes with the number of steps."""

    def schedule(self, steps: Any) -> Schedule:
        return make_schedule(self.scheduler, 2 * steps // 2)


class CountingFamily(StableDiffusion3Family):
    """Its family."""

    adapter = CountingAdapter


def test_an_adapter_that_takes_a_number_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", [*families.families()])
    families.register_family(CountingFamily())
    folder = saved(make_stable_diffusion_3_pipeline(), tmp_path)
    assert resolve(folder, steps=4)[1].steps == 4
    with pytest.raises(UserError, match="--sigmas: the schedule of StableDiffusion3Pipeline depends on a number of"):
        resolve(folder, sigmas=SIGMAS)


def test_timesteps_beside_a_pipelines_own_sigmas_are_refused() -> None:
    """As diffusers' `retrieve_timesteps` refuses two lists."""
    with pytest.raises(UserError, match="--timesteps: the pipeline asks for sigmas of its own"):
        make_schedule(FlowMatchEulerDiscreteScheduler(), Spacing("timesteps", (1000.0, 500.0)), image_tokens=16)


def test_stages_know_the_list(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run") as context:
        before = context.inputs(("steps", "seed"))
    with tiny_context(tmp_path / "run", sigmas=(1.0, 0.3)) as context:
        assert context.inputs(("steps", "seed")) == {**before, "sigmas": [1.0, 0.3]}
        assert context.inputs(("seed",)) == {"seed": 0}
        assert context.schedule.spacing == Spacing("sigmas", (1.0, 0.3))

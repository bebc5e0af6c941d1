"""Every option of a scheduler is followed as the pipeline follows it, has no effect, or is refused by name."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.checkpoints.schedulers import OPTIONS
from adatsq_trt.errors import UserError
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.schedule import DPM, EULER, HEUN, UNIPC, make_schedule
from adatsq_trt.settings import PipelineSettings
from benchmarks.pipelines import run
from tests.tiny_checkpoints import HEIGHT, WIDTH

PROMPTS = ("a red", "three green and seven")
FOLDERS = {EULER: "saved_flux", UNIPC: "saved_wan", DPM: "saved_wan", HEUN: "saved_wan"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MULTISTEP: dict[str, Any] = {
    "flow_shift": 5.0,
    "solver_order": 3,
    "lower_order_final": False,
}
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
    HEUN: {"shift": 5.0},
    UNIPC: {
        **MULTISTEP,
        "solver_type": "bh1",
        "disable_corrector": [1, 2],
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
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
    DPM: {**MULTISTEP, "solver_type": "heun", "use_dynamic_shifting": True},
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
# Of UniPC, with what is said of it.
AT_SIGMA_ZERO = {"solver_type": "its step .* gives NaN", "lower_order_final": "its step"}
# Without which an option says nothing.
BESIDE = {
    "time_shift_type": {"use_dynamic_shifting": True},
    "lower_order_final": {"solver_order": 3},
    "disable_corrector": {"solver_order": 3},
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


def edited(request: pytest.FixtureRequest, name: str, tmp_path: Path, family: str = "", **changes: object) -> Path:
    """A pipeline with such a scheduler, some of whose options are changed."""
    folder = Path(shutil.copytree(request.getfixturevalue(family or FOLDERS[name]), tmp_path / "pipeline"))
    file = folder / "scheduler" / "scheduler_config.json"
    if json.loads(file.read_text())["_class_name"] != name:
        own = {**FLOW, "flow_shift": 3.0} if name in (UNIPC, DPM) else {"shift": 3.0}
        getattr(diffusers, name)(**own).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def outline(folder: Path, **changes: object) -> ModelAdapter:
    settings = PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, prompts=PROMPTS)
    return open_pipeline(settings.model_copy(update=changes)).outline.adapter


def pipelines_own(folder: Path, steps: int) -> Any:
    """The scheduler with the steps that the folder's pipeline takes, as the pipeline asks for them."""
    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index["scheduler"][1])
    scheduler = kind.from_pretrained(folder / "scheduler", local_files_only=True)
    if index["_class_name"] == "WanPipeline":
        scheduler.set_timesteps((steps + 1) // 2 if index["scheduler"][1] == HEUN else steps)
        return scheduler
    tokens, option = HEIGHT // 16 * WIDTH // 16, scheduler.config.get
    shifts = option("base_shift", 0.5), option("max_shift", 1.15)
    mu = calculate_shift(tokens, option("base_image_seq_len", 256), option("max_image_seq_len", 4096), *shifts)
    sigmas = None if option("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, sigmas=sigmas, mu=mu)
    return scheduler


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in sorted(OTHERS[name])])
def test_options_that_are_followed_give_the_pipelines_own_steps(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, option: str
) -> None:
    if name == UNIPC and option in AT_SIGMA_ZERO:
        return
    changes = {**BESIDE.get(option, {}), option: OTHERS[name][option]}
    changes |= {"use_karras_sigmas": True} if option in KARRAS else {}
    if option == "shift" and name == EULER:
        changes["use_dynamic_shifting"] = False
    # Only Flux's pipeline says how far, to these two.
    dynamic = name in (UNIPC, DPM) and "use_dynamic_shifting" in changes
    family = "saved_flux" if dynamic else ""
    folder = edited(request, name, tmp_path, family, **changes)
    others = {key: value for key, value in changes.items() if key != option}
    schedule, expected = outline(folder).schedule(5), pipelines_own(folder, 5)
    assert schedule.sigmas == tuple(expected.sigmas.tolist())
    assert schedule.timesteps == tuple(map(float, expected.timesteps))
    if dynamic and option == "use_dynamic_shifting" and name == DPM:
        return  # without it Flux's pipeline refuses this scheduler
    before = outline(edited(request, name, tmp_path / "before", family, **others)).schedule(5)
    assert (schedule.sigmas, schedule.updates) != (before.sigmas, before.updates)  # the option does something


@pytest.mark.parametrize("option", ["solver_type", "lower_order_final"])
def test_options_that_cannot_reach_sigma_zero_are_refused(
    request: pytest.FixtureRequest, tmp_path: Path, option: str
) -> None:
    changes = {option: OTHERS[UNIPC][option]}
    with pytest.raises(UserError, match=f"UniPCMultistepScheduler is not followed: {AT_SIGMA_ZERO[option]}") as refused:
        outline(edited(request, UNIPC, tmp_path, **changes))
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match="UniPCMultistepScheduler is not followed"):
        outline(edited(request, UNIPC, tmp_path / "third", **changes, solver_order=3))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
@pytest.mark.parametrize("name", [EULER, UNIPC, DPM, HEUN])
def test_sigmas_are_the_pipelines_own_at_every_shift(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, shift: float, dynamic: bool
) -> None:
    """In FluxPipeline where the shift is dynamic, at two anchors that give it; else in WanPipeline."""
    option = "flow_shift" if name in (UNIPC, DPM) else "shift"
    if not dynamic:
        folder = edited(request, name, tmp_path, "saved_wan", **{option: shift})
    elif name == HEUN:
        return  # it has no dynamic shift
    else:
        anchors = {"base_shift": np.log(shift), "max_shift": np.log(shift) + 0.5}
        folder = edited(request, name, tmp_path, "saved_flux", use_dynamic_shifting=True, **anchors)
    for steps in (5, 25):
        schedule, expected = outline(folder).schedule(steps), pipelines_own(folder, steps)
        assert schedule.sigmas == tuple(expected.sigmas.tolist())
        assert schedule.timesteps == tuple(map(float, expected.timesteps))
        assert schedule.pipeline_steps == ((steps + 1) // 2 if name == HEUN else steps)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name].required])
def test_options_that_are_not_followed_are_named(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, option: str
) -> None:
    others = {
        "num_train_timesteps": 500,
        "prediction_type": "epsilon",
        "final_sigmas_type": "sigma_min",
        "solver_p": "x",
        "algorithm_type": "sde-dpmsolver++",
        "variance_type": "learned",
    }
    wanted = OPTIONS[name].required[option]
    folder = edited(request, name, tmp_path, **{option: others.get(option, not wanted)})
    with pytest.raises(
        UserError, match=rf"{name} with {option} = .* is not followed, expected {re.escape(repr(wanted))}"
    ) as refused:
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
        (
            UNIPC,
            {"_class_name": "DDIMScheduler"},
            f"expected {EULER} or {UNIPC} or {DPM} or {HEUN}; save the pipeline with one of these",
        ),
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


def test_heuns_method_takes_an_odd_number_of_calls(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A pipeline's last step has one call, the others two; Wan's 50 steps have 99."""
    folder = edited(request, HEUN, tmp_path)
    opened = open_pipeline(PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, prompts=PROMPTS))
    assert opened.outline.default_steps == 99
    with pytest.raises(UserError, match=r"steps: got 8, .* pass --steps 9 for num_inference_steps=5"):
        opened.outline.adapter.schedule(8)
    assert opened.outline.adapter.schedule(1).pipeline_steps == 1


def test_the_infinity_that_diffusers_writes_is_read(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = edited(request, DPM, tmp_path)
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    schedule = outline(folder).schedule(5)
    assert "lambda_min_clipped" not in schedule.scheduler_config
    again = schedule.scheduler()
    again.set_timesteps(5)
    assert schedule.sigmas == tuple(again.sigmas.tolist())


@pytest.mark.parametrize("case", run.CASES)
def test_the_loop_ends_in_the_pipelines_latents(case: str) -> None:
    """With guidance, for each family's own scheduler and all others that its pipeline takes."""
    row = run.measure(case)
    assert row.difference < run.LIMIT
    if row.scheduler != EULER:
        assert row.of_euler > 10 * run.LIMIT
    else:
        assert row.of_euler < run.LIMIT

"""What every stage keeps resident, told beforehand."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from adatsq_trt.calibration.fisher import backward_step, projections
from adatsq_trt.calibration.trajectory import Samples, seeded_samples, state_tensors
from adatsq_trt.calibration.units import measured_trajectory
from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.execution import InProcess
from adatsq_trt.solver import State
from adatsq_trt.stages import memory
from adatsq_trt.stages.graph import STAGES
from tests.stages.tiny_run import make_model, make_settings

MODEL = memory._model(make_settings(), make_model(), None)
GPU = {"targets": ("sm89",), "formats": ("fp8", "bf16")}


def needed(model: memory.Model = MODEL, **changes: object) -> dict[str, int]:
    return memory.needed_bytes(make_settings(**changes), model, before=1 << 30)


def test_every_stage_has_a_figure_in_its_order() -> None:
    assert [name for name in needed() if name != "loading"] == list(STAGES)
    asked = {name: size for name, size in needed(refine=True).items()}
    assert min(asked.values()) > 1 << 30
    assert needed()["refine"] == 0  # not asked for


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"encoder_bytes": 1 << 40}, {"embed"}),
        ({"file_bytes": 1 << 40}, {"loading"}),
        ({"resident_bytes": 1 << 40}, {"loading", "calibrate", "quantize", "search", "export"}),
        ({"encodings": 1 << 38}, {"loading", "calibrate", "quantize", "search", "export"}),
        ({"latent_bytes": 1 << 38}, {"calibrate", "quantize", "search"}),
        ({"carried": 1 << 38}, {"calibrate", "quantize", "search"}),
    ],
)
def test_what_grows_with_the_model(change: dict[str, int], stages: set[str]) -> None:
    grown = needed(replace(MODEL, **change))
    assert {name for name, size in grown.items() if size > needed()[name]} == stages


def test_what_is_compiled_depends_on_targets_and_layout() -> None:
    large = replace(MODEL, weights=10**9)
    assert needed(large)["bundle"] == needed()["bundle"], "the processor runs graphs"
    sizes = [needed(large, **GPU, layout=layout)["bundle"] for layout in ("plugin", "shared", "embedded")]
    assert sizes == sorted(set(sizes))
    assert needed(large, **GPU, simulate=True)["bundle"] == sizes[0]
    assert needed(replace(large, copied=False))["export"] < needed(large)["export"]


def test_a_given_policy_needs_no_backward_pass() -> None:
    wide = {"projections": 64}
    assert needed(**wide)["search"] > needed(**wide, policy="{}")["search"]
    assert needed(**wide)["calibrate"] == needed()["calibrate"]


def test_a_limit_that_is_too_small_names_the_stage_and_one_that_does() -> None:
    settings, outline = make_settings(), make_model()
    with pytest.raises(
        UserError, match=r"stage '\w+' needs .* GB for .*; pass at least --memory-limit [\d.]+GB"
    ) as told:
        memory.plan_memory(1, settings, outline)
    smallest = str(told.value).partition("at least --memory-limit ")[2].partition(",")[0]
    plan = memory.plan_memory(BuildConfig(memory_limit=smallest).limit_bytes, settings, outline)
    assert plan.limit_bytes == float(smallest.removesuffix("GB")) * 1e9
    assert min(plan.call_bytes, plan.backward_bytes, plan.projection_bytes) > 0
    assert memory.plan_memory(None, settings, outline).limit_bytes > 1 << 30


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "Euler": (FlowMatchEulerDiscreteScheduler(), 0),
    "UniPC": (UniPCMultistepScheduler(**FLOW), 2),
    "UniPC, order 3": (UniPCMultistepScheduler(**FLOW, solver_order=3), 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_states_take_no_more_than_planned(name: str) -> None:
    """Every tensor that a loop and its gradients keep, of four samples."""
    scheduler, carried = SCHEDULERS[name]
    settings, outline = make_settings(steps=5, calibration_samples=4, projections=3), make_model()
    outline.adapter.scheduler = scheduler
    model = memory._model(settings, outline, None)
    assert model.carried == carried
    loop, adjoints, _ = memory.state_bytes(settings, model)

    adapter = outline.adapter
    samples, workers = seeded_samples(adapter, adapter.schedule(5), 2.0, 4, 0, [0]), InProcess()
    states = [State(samples.noise())]
    states += measured_trajectory(workers, workers.share(samples), states[0].latent, 5)
    kept = sum(map(bytes_of, states)) + sum(tensor.nbytes for tensor in state_tensors(states).values())
    assert loop / 2 < kept <= loop
    assert bytes_of(states[-1]) == 4 * (1 + carried) * model.latent_bytes

    gradient = State(projections(4, adapter.latent_shape, 3, seed=0))
    gradients = [gradient, *backwards(samples, states, gradient)]
    assert adjoints / 2 < sum(map(bytes_of, gradients)) <= adjoints


def backwards(
    samples: Samples, states: list[State[torch.Tensor]], gradient: State[torch.Tensor]
) -> Iterator[State[torch.Tensor]]:
    for step in range(4, -1, -1):
        gradient = backward_step(samples, states[step].latent, gradient, step, lambda layers: None)
        yield gradient


def bytes_of(state: State[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (state.latent, *state.clean))

"""The timing that estimates are made from: it runs on every kind of model, and leaves no trace."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adatsq_trt.config import BuildConfig
from adatsq_trt.models.simulated import SimulatedLinear
from adatsq_trt.progress import Reporter
from adatsq_trt.stages import timing
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.prepare import prepare
from adatsq_trt.stages.work import Work
from tests.stages.tiny_run import tiny_context
from tests.tiny_checkpoints import (
    HEIGHT,
    WIDTH,
    make_flux_pipeline,
    make_z_image_pipeline,
)
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline
from tests.tiny_wan_experts import make_wan_experts_pipeline

UNITS = ("call", "rounded", "pair", "moments", "fisher", "gradients", "clips", "sensitivity")
SIMULATED: dict[str, Any] = {
    **{"formats": ("w4a4", "w8a8"), "targets": (), "simulate": True, "weights": "free"},
    **{"hessian": "coherent", "calibration_samples": 3},
}


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    monkeypatch.setattr(timing, "_LONGEST_SECONDS", 1e-9)  # one sample, twice
    with tiny_context(tmp_path / "run", **SIMULATED) as made:
        yield made


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_timed_and_the_model_is_as_it_was(context: Context, unit: str) -> None:
    transformer, random = context.adapter.transformer, torch.get_rng_state()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    assert timing.TimedUnits(context).seconds(unit) > 0
    assert torch.equal(torch.get_rng_state(), random)
    after = transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, SimulatedLinear) for module in transformer.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    assert context.run.path.joinpath("stages").exists() is False, "nothing is written"


def test_every_unit_has_seconds(context: Context) -> None:
    work = Work({unit: 1 for unit in (*UNITS, "layer", "trace", "graph", "plan")})
    assert timing.unit_seconds(context, work).keys() == work.keys()


def test_what_is_worth_it_is_timed_by_itself(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(timing, "_LONGEST_SECONDS", 1e9)
    monkeypatch.setattr(timing.TimedUnits, "seconds", lambda _self, unit: timed.append(unit) or 1.0)
    timing.unit_seconds(context, Work({"call": 1, "fisher": 1, "sensitivity": 1000}))
    assert timed == ["call", "sensitivity"]


def test_a_large_model_is_told_from_its_arithmetic(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MOST_OPERATIONS", 0)
    monkeypatch.setattr(timing.TimedUnits, "seconds", lambda *_: pytest.fail("it is not run"))
    each = timing.unit_seconds(context, Work({"call": 1, "fisher": 1000}))
    assert each["fisher"] == 3 * each["call"] > 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_flux_pipeline, {}),
        (make_z_image_pipeline, {}),
        (make_qwen_image_pipeline, {}),
        (make_stable_diffusion_3_pipeline, {}),
        (make_wan_experts_pipeline, {"frames": 5, "steps": 4}),
    ],
)
def test_a_checkpoint_is_timed_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    monkeypatch.setattr(timing, "_LONGEST_SECONDS", 1e-9)
    given = {
        "target": "sm120",
        "formats": "fp8,bf16",
        "steps": 2,
        "height": HEIGHT,
        "width": WIDTH,
        "prompts": ("a", "red"),
        **options,
    }
    asked = prepare(make(), BuildConfig(**given, calibration_samples=2), "bundle")
    with asked.run(tmp_path / "run", Reporter()) as build:
        assert next(build.outline.adapter.transformer.parameters()).is_meta
        found = timing._small_enough(build.outline)
        assert found is not None
        for unit in ("call", "fisher", "rounded"):
            assert found.seconds(unit) > 0

"""Counts of work are those of the calls that a tiny build makes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.simulated import SimulatedLinear
from adatsq_trt.progress import Progress, Reporter
from adatsq_trt.stages import bundle, calibrate, export, quantize, refine, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import STAGES
from adatsq_trt.stages.work import Work
from tests.stages.tiny_run import given_policy, tiny_context

# More samples than a part of the batch, so that no count is of calls or parts.
SMALL: dict[str, Any] = {
    **{"calibration_samples": 18, "selection_samples": 3, "held_out_samples": 5, "projections": 1},
    **{"hessian": "coherent", "guidance": 2.0},
}
GIVEN: dict[str, Any] = {"budget_bits": None, "refine": True}
SIMULATED: dict[str, Any] = {"formats": ("w4a4", "w8a8"), "targets": (), "simulate": True, "weights": "free"}
BY_TASK = {
    "calibrate: Fisher information": "fisher",
    "calibrate: shared gradients": "gradients",
    "calibrate: Hessians": "moments",
    "quantize: clips": "clips",
    "search: sensitivity": "sensitivity",
}


class Counted:
    """Units of a stage that is under way, by the calls that it makes."""

    def __init__(self) -> None:
        self.work, self.task, self.stage = Work(), "", ""

    def tell(self, progress: Progress) -> None:
        self.task = "" if progress.ended else progress.task
        if progress.ended and progress.task == "export":
            self.work["graph"] += progress.done - self.work["trace"]
        if progress.ended and progress.task.startswith("build:"):
            self.work["plan"] += progress.done

    def call(self, adapter: FluxAdapter, inputs: dict[str, Tensor]) -> None:
        samples = len(next(iter(inputs.values()))) // 2  # of the branches of guidance
        if self.stage == export.NAME:
            self.work["pair"] += samples // 2
            return
        linears = (module for module in adapter.transformer.modules() if isinstance(module, SimulatedLinear))
        plain = "rounded" if any(linear.active is not None for linear in linears) else "call"
        unit = BY_TASK.get(self.task, plain)
        self.work[unit if torch.is_grad_enabled() or unit == "moments" else plain] += samples


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()

    def count(owner: object, name: str, seen: Callable[..., None]) -> None:
        own = getattr(owner, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            seen(*arguments)
            return own(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    def one(unit: str) -> Callable[..., None]:
        return lambda *_: found.work.update([unit])

    count(FluxAdapter, "predict", found.call)
    count(quantize, "solve_layer", one("layer"))
    count(export, "trace", one("trace"))
    monkeypatch.setattr(refine, "factorize", _counting(refine.factorize, one("layer")))
    return found


def _counting(own: Callable[..., Any], seen: Callable[..., None]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        seen(*arguments)
        return own(*arguments)

    return counting


@contextmanager
def run_of(folder: Path, counted: Counted, **changes: Any) -> Iterator[Context]:
    with tiny_context(folder, **SMALL | changes) as context:
        yield replace(context, progress=Reporter(counted.tell))


def told_and_made(context: Context, counted: Counted, name: str) -> tuple[Work, Work]:
    """Work of a stage as it is told before it runs, and as it was."""
    told = STAGES[name].module.work(context)
    counted.work, counted.stage = Work(), name
    STAGES[name].run(context)
    return told, counted.work


@pytest.mark.parametrize(
    ("target", "formats", "plans"),
    [("cpu", ("w8a8s", "fp32"), 0), pytest.param("sm120", ("fp8", "bf16"), 2, marks=pytest.mark.slow)],
)
def test_a_build_makes_the_calls_that_are_counted(
    tmp_path: Path, counted: Counted, target: str, formats: tuple[str, str], plans: int
) -> None:
    policy = given_policy(*formats).model_dump_json()
    with run_of(tmp_path / "run", counted, targets=(target,), formats=formats, policy=policy, **GIVEN) as context:
        for module in (calibrate, quantize, search, refine, export, bundle):
            told, made = told_and_made(context, counted, module.NAME)
            assert told == made, module.NAME
            assert made or (module is bundle and not plans)
        assert made["plan"] == plans


@pytest.mark.parametrize("transform", [None, "smooth"])
def test_a_search_makes_no_more_calls_than_are_counted(tmp_path: Path, counted: Counted, transform: str | None) -> None:
    with run_of(tmp_path / "run", counted, **SIMULATED, beam=2, transform=transform) as context:
        for module in (calibrate, quantize):
            told, made = told_and_made(context, counted, module.NAME)
            assert told == made, module.NAME
        assert made["clips"]
        told, made = told_and_made(context, counted, search.NAME)
        assert made["sensitivity"] == told["sensitivity"]
        assert made <= told
        assert 8 * made["rounded"] > told["rounded"] > 0

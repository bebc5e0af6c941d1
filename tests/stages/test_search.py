"""Stage `search`: what is refused before it runs, what it writes, and a policy that replaces it."""

import logging
from pathlib import Path

import pytest

from adatsq_trt.errors import BudgetError, DamagedFileError, MismatchError, UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.policy import Policy
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import calibrate, quantize, search
from adatsq_trt.stages.context import Context
from tests.stages.tiny_run import HASH, make_model, make_settings, tiny_context

MODEL = make_model()
LAYERS = list(MODEL.adapter.quantizable_layers())


def policy(*steps: str, layers: list[str] = LAYERS, weights: str = HASH) -> str:
    """The text of a policy with one format in each step."""
    rows = [[name] * len(layers) for name in steps]
    return Policy.from_steps("tiny", weights, layers, rows).model_dump_json()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget_bits": 7.9}, BudgetError, "the cheapest is w8a8s everywhere with a mean of 8 bits"),
        ({"budget_bits": float("nan")}, BudgetError, "no policy of these formats is that small"),
        ({"budget_bytes": 1.0}, BudgetError, "--budget-size 1: the smallest weights"),
        ({"expansions": 2, "beam": 0}, UserError, "--expansions 2: there is no beam search that it could shorten"),
        ({"policy": policy("fp32")}, MismatchError, "step"),
        ({"policy": policy("fp32", "fp32", weights="1" * 64)}, MismatchError, "weights"),
        ({"policy": policy("fp32", "fp32", layers=LAYERS[1:])}, MismatchError, "layer"),
        (
            {"policy": policy("fp8", "fp32")},
            MismatchError,
            "--policy uses fp8, the formats of this run are w8a8s, fp32",
        ),
        ({"policy": policy("w8a8s", "fp32"), "max_assignments": 1}, MismatchError, "--policy has 2 assignments"),
        ({"policy": "{"}, DamagedFileError, "--policy"),
    ],
)
def test_what_cannot_be_searched_is_refused_first(changes: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        search.require_possible(make_settings(**changes), MODEL)


@pytest.mark.parametrize("changes", [{"budget_bits": 8.0}, {"budget_bytes": 1e9}, {"policy": policy("fp32", "w8a8s")}])
def test_what_can_be_is_not(changes: dict[str, object]) -> None:
    search.require_possible(make_settings(**changes), MODEL)


@pytest.mark.parametrize("weights", ["once", "free"])
def test_budgets_that_cannot_be_kept_together_are_refused_first(weights: str) -> None:
    """fp8 has the fewest bits and int4wo the fewest bytes; a search found it after all formats were measured."""
    common = {"formats": ("fp8", "int4wo", "bf16"), "targets": ("sm120",), "weights": weights}
    size = 2 * sum(linear.in_features * linear.out_features for linear in MODEL.adapter.quantizable_layers().values())
    for alone in ({"budget_bits": 8.2}, {"budget_bits": None, "budget_bytes": 0.4 * size}):
        search.require_possible(make_settings(**common, **alone), MODEL)
    with pytest.raises(
        BudgetError, match="--budget-bits, --budget-size: no policy of these formats keeps these budgets"
    ):
        search.require_possible(make_settings(**common, budget_bits=8.2, budget_bytes=0.4 * size), MODEL)


def test_the_policy_is_the_best_within_the_budget_and_its_layers_keep_their_weights(finished: Context) -> None:
    folder = search.stage(finished).folder
    result = read_json_model(folder / search.RESULT, SearchResult)
    chosen, found = result.points[result.chosen], Policy.load(folder / search.POLICY)
    within = [point for point in result.points if result.limits.kept_by(point.mean_bits, point.costs)]
    assert chosen in within
    own = result.points[result.searched]
    assert own.rank_error == min(point.rank_error for point in within if point.samples == own.samples)
    assert found == Policy.from_steps("tiny", HASH, finished.layers, chosen.formats)
    assert all(len(set(column)) == 1 for column in zip(*found.assignments, strict=True)), "weights once"
    uniform = {point.name: point for point in result.points if point.kind == "uniform"}
    assert set(uniform) == {"w8a8s", "fp32"}
    assert uniform["fp32"] not in within
    assert uniform["fp32"].held_out_error == pytest.approx(0, abs=1e-12)
    assert result.denoiser_calls > 0
    assert result.sensitivity_sweeps == finished.settings.projections


def test_a_given_policy_is_judged_and_not_searched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = policy("w8a8s", "fp32")
    with tiny_context(tmp_path / "run", policy=given) as context, caplog.at_level(logging.WARNING):
        calibrate.run(context)
        quantize.run(context)
        folder = search.run(context).folder
        result = read_json_model(folder / search.RESULT, SearchResult)
        assert Policy.load(folder / search.POLICY) == Policy.model_validate_json(given)
        assert result.points[result.chosen].kind == "given"
        assert {point.kind for point in result.points} == {"given", "uniform"}
        assert not (folder / search.SENSITIVITY).exists()
        assert result.sensitivity_sweeps == 0
    assert f"changes the weight format of {len(LAYERS)} of {len(LAYERS)} layers between steps" in caplog.text


@pytest.mark.parametrize(
    ("changes", "done"), [({"targets": ("sm80",)}, False), ({"layout": "switch"}, True), ({"beam": 3}, False)]
)
def test_the_layout_does_not_count(finished: Context, changes: dict[str, object], done: bool) -> None:
    settings = finished.settings.model_copy(update=changes)
    assert search.stage(Context(finished.run, settings, finished.model)).done is done


def test_affordable_budgets_are_let_through_and_others_not(finished: Context) -> None:
    search.require_affordable(finished)
    with tiny_times(finished, 1e9) as context:
        search.require_affordable(context)
    with tiny_times(finished, 1e-9) as context, pytest.raises(BudgetError, match="the fastest policy"):
        search.require_affordable(context)


def tiny_times(finished: Context, budget_ms: float):  # type: ignore[no-untyped-def]
    """The finished run with a budget in milliseconds on a card."""
    from contextlib import nullcontext

    from adatsq_trt.search.costs import time_model

    changes = {"formats": ("fp8", "bf16"), "budget_ms": budget_ms, "times": time_model("rtx-4090")[1]}
    settings = finished.settings.model_copy(update=changes)
    return nullcontext(Context(finished.run, settings, finished.model))

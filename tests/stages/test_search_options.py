"""The search's own options on a tiny model: effort, precision, limits, threads."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.formats import Grid, format_named
from adatsq_trt.search.select import Point, SearchResult
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate, compare, quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.run_directory import RunDirectory
from tests.stages.tiny_run import tiny_context

STEPS, EXPANSIONS, BUDGET = 3, 2, 6.0
SIMULATED: dict[str, Any] = {
    **{"formats": ("w4a4", "w8a8"), "targets": (), "simulate": True},
    **{"budget_bits": BUDGET, "steps": STEPS, "weights": "free"},
}


# Formats that share weights, of which a layer keeps one for all steps.
ONCE: dict[str, Any] = {"formats": ("w3a3", "w3a5", "w4a4", "w4a5"), "weights": "once", "budget_bits": 4.0}


def quantize_in(folder: Path, **changes: Any) -> Path:
    """A run whose weights are quantized; for copies."""
    with tiny_context(folder, **SIMULATED | changes) as context:
        run_stages(context, quantize.NAME)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_in(tmp_path_factory.mktemp("quantized") / "run")


@pytest.fixture(scope="module")
def quantized_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_in(tmp_path_factory.mktemp("quantized") / "run", **ONCE)


@contextmanager
def searched(quantized: Path, folder: Path, **changes: Any) -> Iterator[Context]:
    """A search of its own over those weights."""
    if not folder.exists():
        shutil.copytree(quantized, folder)
    with tiny_context(folder, **SIMULATED | changes) as context:
        assert calibrate.stage(context).done
        assert quantize.stage(context).done
        search.run(context)
        yield context


def result(context: Context) -> SearchResult:
    return read_json_model(context.run.path / search.NAME / search.RESULT, SearchResult)


def log_sensitivities(context: Context) -> torch.Tensor:
    """Of w4a4, one number for each step and layer."""
    return read_tensors(context.run.path / search.NAME / search.SENSITIVITY)["errors"][0].flatten().double().log()


def calls(context: Context) -> int:
    column = context.run.path / search.NAME / "columns" / f"column_{STEPS - 1:03d}.safetensors"
    return int(read_tensors(column)["calls"])


def test_few_expansions_and_bfloat16_keep_their_limits_and_choose_the_best_they_saw(
    quantized: Path, tmp_path: Path
) -> None:
    """Which policy is found is no part of it: on two samples that is decided by how a processor rounds.

    How good policies from few expansions are is measured on many problems in tests/search/test_beam.py.
    """
    with searched(quantized, tmp_path / "full") as context:
        full, all_calls, exact_logs = result(context), calls(context), log_sensitivities(context)
    with searched(quantized, tmp_path / "few", expansions=EXPANSIONS, search_precision="bfloat16") as context:
        few, few_calls, logs = result(context), calls(context), log_sensitivities(context)
        own = read_tensors(context.run.path / search.NAME / calibrate.TRAJECTORY)["latents"]
        exact = read_tensors(context.run.path / calibrate.NAME / calibrate.TRAJECTORY)["latents"]
    assert few_calls <= STEPS * EXPANSIONS < all_calls
    for found in (full, few):
        allowed = [point for point in found.points if point.mean_bits <= BUDGET + 1e-9]
        assert {"beam", "plan", "layer_only", "time_only"} <= {point.kind for point in allowed}
        chosen = found.points[found.chosen]
        assert chosen in allowed
        searched_point = found.points[found.searched]
        seen = searched_point.samples
        assert searched_point.rank_error == min(point.rank_error for point in allowed if point.samples == seen)
    # Both precisions see the same steps and layers as sensitive.
    assert not torch.equal(exact_logs, logs)
    assert float(torch.corrcoef(torch.stack([exact_logs, logs]))[0, 1]) > 0.95
    # Errors are relative to a trajectory of the same precision.
    assert torch.equal(own[0], exact[0])
    assert 0 < float((own[-1] - exact[-1]).norm() / exact[-1].norm()) < 0.05


def weight_grids(point: Point) -> list[set[Grid]]:
    """Of each layer over all steps."""
    return [{format_named(name).weight for name in column} for column in zip(*point.formats, strict=True)]


@pytest.mark.parametrize("weights", ["free", "once"])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_no_judged_policy_within_budget_and_limit_beats_the_chosen_one(
    quantized: Path, quantized_once: Path, tmp_path: Path, limit: int | None, weights: str
) -> None:
    source, changes = (quantized, {}) if weights == "free" else (quantized_once, ONCE)
    with searched(source, tmp_path / "run", **changes, max_assignments=limit) as context:
        found, budget = result(context), context.settings.budget_bits
    assert budget is not None
    chosen = found.points[found.chosen]
    eligible = [p for p in found.points if p.mean_bits <= budget and (limit is None or p.assignments <= limit)]
    assert {"merged" if limit else "plan", "layer_only", "time_only", "uniform"} <= {p.kind for p in found.points}
    assert chosen in eligible
    # Near choices were settled on more samples than the others were seen on.
    own = found.points[found.searched]
    assert own.samples == max(p.samples for p in eligible)
    assert own.rank_error == min(p.rank_error for p in eligible if p.samples == own.samples)
    if weights == "once":
        assert all(len(grids) == 1 for point in found.points for grids in weight_grids(point))
        assert any(point.assignments > 1 for point in found.points if point.kind == "plan")


def test_without_a_beam_the_plan_and_its_hedges_are_judged(quantized_once: Path, tmp_path: Path) -> None:
    with searched(quantized_once, tmp_path / "run", **ONCE, beam=Settings.model_fields["beam"].default) as context:
        found, folder = result(context), context.run.path / search.NAME
    kinds = [point.kind for point in found.points]
    assert "beam" not in kinds
    assert kinds.count("plan") >= 2
    assert not (folder / "columns").exists()
    # Whole policies of every step, on as many batches as it took to tell them apart, and nothing else called the model.
    assert found.denoiser_calls >= STEPS * len({point.formats for point in found.points})
    assert found.denoiser_calls % STEPS == 0


def test_settings_that_came_later_leave_earlier_runs_alone(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their defaults are no part of a stage's key: a run of a version without them goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(search, "_NEWER_SETTINGS", ())  # a version that does not know them
        with searched(quantized, tmp_path / "run") as context:
            file = context.run.path / search.NAME / search.RESULT
            made = file.stat().st_mtime_ns
    with searched(quantized, tmp_path / "run"):
        assert file.stat().st_mtime_ns == made
    with searched(quantized, tmp_path / "run", expansions=1):
        assert file.stat().st_mtime_ns != made
        made = file.stat().st_mtime_ns
    with searched(quantized, tmp_path / "run", expansions=1, weights="once"):
        assert file.stat().st_mtime_ns != made


def test_a_search_in_threads_ends_as_one_in_a_single_thread(quantized: Path, tmp_path: Path) -> None:
    """With several processors to a process units of work are computed in threads; not so in these tests otherwise."""
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with searched(quantized, tmp_path / f"{threads}") as context:
                with search._exact_executor(context) as executor:
                    assert (executor is context.executor) == (threads == 1)
                made.append(
                    [(context.run.path / search.NAME / name).read_bytes() for name in ("policy.json", "result.json")]
                )
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


def test_a_search_with_a_transform_is_compared_with_it(quantized: Path, tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run", **SIMULATED | {"transform": "smooth"}) as context:
        run_stages(context, search.NAME)
        assert set(compare.solver_errors(context)) == {"policy", "uniform w4a4"}
        smooth = quantize.stage(context).folder
    plain = RunDirectory.existing(quantized).path / quantize.NAME
    assert (smooth / "transforms.safetensors").exists()
    assert not (plain / "transforms.safetensors").exists()
    name = "w4a4/transformer_blocks.0.safetensors"
    assert (plain / name).read_bytes() != (smooth / name).read_bytes()

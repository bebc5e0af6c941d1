"""Options of the search's effort, on a model of the zoo."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.formats import Grid, format_named
from adatsq_trt.search.select import Point, Proposal, SearchResult
from adatsq_trt.stages import judging, search
from adatsq_trt.stages.context import Context

STEPS, EXPANSIONS = 3, 2
BUDGET = 6.0  # mean bits: the default


def result(run: Path) -> SearchResult:
    return read_json_model(run / search.NAME / search.RESULT, SearchResult)


def log_sensitivities(run: Path) -> torch.Tensor:
    """Of w4a4, one number for each step and layer."""
    return read_tensors(run / search.NAME / search.SENSITIVITY)["errors"][0].flatten().double().log()


def test_few_expansions_and_bfloat16_keep_their_limits_and_choose_the_best_they_saw(cli, tmp_path: Path) -> None:
    """Which policy is found is no part of it: on two samples that is decided by how a processor rounds.

    How good policies from few expansions are is measured on many problems in tests/search/test_beam.py.
    """
    run = tmp_path / "run"
    command = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", *cli.small, "--output", run)
    command = (*command, "--steps", str(STEPS), "--weights", "free")
    cli(*command)
    full, columns, exact_logs = result(run), run / search.NAME / "columns", log_sensitivities(run)
    all_calls = int(read_tensors(columns / f"column_{STEPS - 1:03d}.safetensors")["calls"])
    cli(*command, "--expansions", str(EXPANSIONS), "--search-precision", "bfloat16")
    few = result(run)
    few_calls = int(read_tensors(columns / f"column_{STEPS - 1:03d}.safetensors")["calls"])
    assert few_calls <= STEPS * EXPANSIONS < all_calls
    for found in (full, few):
        allowed = [point for point in found.points if point.mean_bits <= BUDGET + 1e-9]
        assert {"beam", "plan", "layer_only", "time_only"} <= {point.kind for point in allowed}
        chosen = found.points[found.chosen]
        assert chosen in allowed
        assert chosen.rank_error == min(point.rank_error for point in allowed)
    # Both precisions see the same steps and layers as sensitive: 132 numbers over three orders of magnitude.
    logs = torch.stack([exact_logs, log_sensitivities(run)])
    assert not torch.equal(logs[0], logs[1])
    assert float(torch.corrcoef(logs)[0, 1]) > 0.95
    # Errors are relative to a trajectory of the same precision.
    own = read_tensors(run / search.NAME / "trajectory.safetensors")["latents"]
    exact = read_tensors(run / "calibrate" / "trajectory.safetensors")["latents"]
    assert torch.equal(own[0], exact[0])
    assert 0 < float((own[-1] - exact[-1]).norm() / exact[-1].norm()) < 0.05


def weight_grids(point: Point) -> list[set[Grid]]:
    """Of each layer over all steps."""
    return [{format_named(name).weight for name in column} for column in zip(*point.formats, strict=True)]


@pytest.mark.parametrize("weights", ["free", "once"])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_no_judged_policy_within_budget_and_limit_beats_the_chosen_one(
    cli, tmp_path_factory: pytest.TempPathFactory, limit: int | None, weights: str
) -> None:
    run = tmp_path_factory.getbasetemp() / f"limited_{weights}"  # calibration and weights are made once
    formats = "w3a3,w4a4,w5a5" if weights == "free" else "w3a3,w3a5,w4a4,w4a5"
    options = (
        "--simulate",
        "--weights",
        weights,
        "--formats",
        formats,
        *cli.small,
        "--steps",
        "4",
        "--budget-bits",
        "4",
    )
    few = () if limit is None else ("--max-assignments", str(limit))
    ended = cli("search", "digits-flux", *options, *few, "--output", run)
    assert ended.code == 0, ended.err
    found = result(run)
    chosen = found.points[found.chosen]
    eligible = [p for p in found.points if p.mean_bits <= 4 and (limit is None or p.assignments <= limit)]
    assert {"merged" if limit else "plan", "layer_only", "time_only", "uniform"} <= {p.kind for p in found.points}
    assert chosen in eligible
    # Near choices were settled on more samples than the others were seen on.
    assert chosen.samples == max(p.samples for p in eligible)
    assert chosen.rank_error == min(p.rank_error for p in eligible if p.samples == chosen.samples)
    if weights == "once":
        assert all(len(grids) == 1 for point in found.points for grids in weight_grids(point))
        assert any(point.assignments > 1 for point in found.points if point.kind == "plan")


def test_a_given_policy_that_changes_weights_is_taken_and_that_is_said(cli, tmp_path: Path) -> None:
    options = ("--simulate", "--formats", "w3a3,w4a4", *cli.small, "--budget-bits", "3.5")
    cli("search", "digits-flux", *options, "--weights", "free", "--output", tmp_path / "free")
    policy = json.loads((tmp_path / "free" / search.NAME / search.POLICY).read_text())
    cells = [["w3a3"] * len(policy["layers"]), ["w4a4", *["w3a3"] * (len(policy["layers"]) - 1)]]
    given = tmp_path / "given.json"
    given.write_text(json.dumps(policy | {"assignments": cells, "step_assignments": [0, 1]}))
    ended = cli("search", "digits-flux", *options, "--policy", given, "--output", tmp_path / "once")
    assert ended.code == 0, ended.err
    assert f"--policy changes the weight format of 1 of {len(policy['layers'])} layers between steps" in ended.err
    found = result(tmp_path / "once")
    assert [set(row) for row in found.points[found.chosen].formats] == [{"w3a3"}, {"w3a3", "w4a4"}]


def test_settings_that_came_later_leave_earlier_runs_alone(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their defaults are no part of a stage's key: a run of a version without them goes on."""
    command = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", *cli.small, "--steps", "1")
    command = (*command, "--weights", "free", "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(search, "_NEWER_SETTINGS", ())  # a version that does not know them
        cli(*command)
    file = tmp_path / "run" / search.NAME / search.RESULT
    made = file.stat().st_mtime_ns
    cli(*command)
    assert file.stat().st_mtime_ns == made
    cli(*command, "--expansions", "1")
    assert file.stat().st_mtime_ns != made
    made = file.stat().st_mtime_ns
    cli(*command, "--expansions", "1", "--weights", "once")
    assert file.stat().st_mtime_ns != made


@pytest.mark.parametrize("weights", ["once", "free"])
def test_a_policy_that_something_simple_beats_is_not_returned(
    cli, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """A search whose choice went wrong: 8 bits for larger layers and 3 for others, where 5 everywhere is better."""
    run = tmp_path_factory.getbasetemp() / "dominated"  # calibration and weights are made once
    uniforms, best = search._uniforms, judging.Judging._best

    def with_a_bad_plan(context: Context) -> list[Proposal]:
        sizes = [layer.in_features * layer.out_features for layer in context.adapter.quantizable_layers().values()]
        middle = sorted(sizes)[len(sizes) // 2]
        row = tuple(2 if size >= middle else 0 for size in sizes)
        return [*uniforms(context), Proposal("plan", (row,) * context.settings.steps)]

    def worst(self: judging.Judging, points: list[Point], among: Sequence[int]) -> tuple[list[Point], int]:
        own = [i for i, p in enumerate(points) if p.kind == "plan" and set(p.formats[0]) == {"w3a3", "w8a8"}]
        return best(self, points, among)[0], own[-1]

    monkeypatch.setattr(search, "_uniforms", with_a_bad_plan)
    monkeypatch.setattr(judging.Judging, "_best", worst)
    options = ("--simulate", "--formats", "w3a3,w5a5,w8a8", "--budget-bits", "8", "--weights", weights, *cli.small)
    ended = cli("search", "digits-flux", *options, "--selection-samples", "8", "--output", run)
    assert ended.code == 0, ended.err
    found = result(run)
    assert found.dominated is not None
    bad, simple = found.points[found.dominated.searched], found.points[found.dominated.by]
    assert simple.kind in ("uniform", "layer_only", "time_only")
    assert simple.costs.resident_bytes <= bad.costs.resident_bytes
    assert simple.costs.activation_bits <= bad.costs.activation_bits
    assert found.dominated.ratio < 1
    assert found.dominated.samples == 8
    assert found.chosen == (found.dominated.by if weights == "once" else found.dominated.searched)
    said = "is returned" if weights == "once" else "would be the better choice"
    assert said in ended.out

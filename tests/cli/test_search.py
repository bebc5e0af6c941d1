"""Options of the search's effort, on a model of the zoo."""

from pathlib import Path

import pytest
import torch

from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import search

STEPS, EXPANSIONS = 3, 2


def result(run: Path) -> SearchResult:
    return read_json_model(run / search.NAME / search.RESULT, SearchResult)


def test_few_expansions_and_bfloat16_find_a_policy_as_good(cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", *cli.small, "--output", run)
    command = (*command, "--steps", str(STEPS))
    cli(*command)
    full, columns = result(run), run / search.NAME / "columns"
    all_calls = int(read_tensors(columns / f"column_{STEPS - 1:03d}.safetensors")["calls"])
    cli(*command, "--expansions", str(EXPANSIONS), "--search-precision", "bfloat16")
    few = result(run)
    few_calls = int(read_tensors(columns / f"column_{STEPS - 1:03d}.safetensors")["calls"])
    assert few_calls <= STEPS * EXPANSIONS < all_calls
    errors = [found.points[found.chosen].held_out_error for found in (full, few)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < 1.25 * errors[0]
    # Errors are relative to a trajectory of the same precision.
    own = read_tensors(run / search.NAME / "trajectory.safetensors")["latents"]
    exact = read_tensors(run / "calibrate" / "trajectory.safetensors")["latents"]
    assert torch.equal(own[0], exact[0])
    assert 0 < float((own[-1] - exact[-1]).norm() / exact[-1].norm()) < 0.05


def test_settings_that_came_later_leave_earlier_runs_alone(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their defaults are no part of a stage's key: a run of a version without them goes on."""
    command = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", *cli.small, "--steps", "1")
    command = (*command, "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(search, "_NEWER_SETTINGS", ())  # a version that does not know them
        cli(*command)
    file = tmp_path / "run" / search.NAME / search.RESULT
    made = file.stat().st_mtime_ns
    cli(*command)
    assert file.stat().st_mtime_ns == made
    cli(*command, "--expansions", "1")
    assert file.stat().st_mtime_ns != made

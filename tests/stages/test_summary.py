"""The figures at the top of a run directory."""

import shutil
from pathlib import Path

import pytest

from adatsq_trt.errors import MismatchError, MissingFileError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.policy import Policy, resident_weight_bytes
from adatsq_trt.report.summary import Summary
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME
from adatsq_trt.stages import budget, search, summary
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import STAGES
from adatsq_trt.stages.run_directory import RunDirectory


def test_its_figures_are_those_of_the_stages(finished: Context) -> None:
    found = read_json_model(finished.run.path / summary.SUMMARY_NAME, Summary)
    folder = search.stage(finished).folder
    policy, result = Policy.load(folder / search.POLICY), read_json_model(folder / search.RESULT, SearchResult)
    assert Policy.load(finished.run.path / summary.POLICY_NAME) == policy
    assert found.final_error == result.points[result.chosen].held_out_error
    assert (found.buckets, found.assignments) == (len(policy.buckets), len(policy.assignments))
    assert found.mean_bits == policy.mean_bits <= 20.0
    shapes = {shape.name: shape for shape in budget.shapes_of(finished)}
    assert found.resident_weight_bytes == resident_weight_bytes(policy, shapes)
    assert set(found.uniform_errors) == {"w8a8s", "fp32"}
    assert found.rounding_error == 0.0
    assert found.ms is None
    assert set(found.stages) == set(STAGES) - {"embed", "refine"}
    assert found.held_out_seeds == (finished.held_out.seeds[0], finished.held_out.seeds[-1])


def test_it_is_read_where_it_is_of_the_stages_beside_it(finished: Context, tmp_path: Path) -> None:
    assert summary.read(finished.run) == read_json_model(finished.run.path / summary.SUMMARY_NAME, Summary)
    copy = Path(shutil.copytree(finished.run.path, tmp_path / "run"))
    write_json_model(copy / SETTINGS_NAME, finished.settings.model_copy(update={"seed": 1}))
    with pytest.raises(MismatchError, match="is of a later command than the build in this folder"):
        summary.read(RunDirectory.existing(copy))
    (copy / summary.SUMMARY_NAME).unlink()
    with pytest.raises(MissingFileError):
        summary.read(RunDirectory.existing(copy))

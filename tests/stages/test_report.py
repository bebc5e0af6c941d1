"""What a report shows is gathered from a finished run."""

import shutil
from pathlib import Path

import pytest
import torch

from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model, read_tensors, write_tensors
from adatsq_trt.policy import Policy
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import bundle, calibrate, report, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.stages.summary import POLICY_NAME


@pytest.fixture
def copy(finished: Context, tmp_path: Path) -> RunDirectory:
    return RunDirectory.existing(Path(shutil.copytree(finished.run.path, tmp_path / "copy")))


def test_tables_and_policies_are_those_of_the_run(finished: Context) -> None:
    data = report.gather(finished.run)
    steps, layers = finished.settings.steps, len(finished.layers)
    statistics = read_tensors(calibrate.stage(finished).folder / calibrate.STATISTICS)
    assert (data.information == statistics["information"].numpy()).all()
    assert data.sensitivity is not None
    assert data.sensitivity.shape == (2, steps, layers)
    result = read_json_model(search.stage(finished).folder / search.RESULT, SearchResult)
    assert [judged.chosen for judged in data.judged] == [i == result.chosen for i in range(len(result.points))]
    assert all(errors.shape == (steps + 1,) for errors in data.trajectory_errors.values())
    assert (data.engines, data.check, data.pictures) == ((), None, None)
    assert data.layout == "embedded"


def test_a_policy_of_another_search_is_refused(copy: RunDirectory) -> None:
    policy = Policy.load(copy.path / POLICY_NAME)
    other = Policy.from_steps("tiny", policy.weights_sha256, policy.layers, [["fp32"] * len(policy.layers)] * 2)
    other.save(copy.path / POLICY_NAME)
    with pytest.raises(MismatchError, match="is not the policy of the search in"):
        report.gather(copy)


@pytest.mark.parametrize("table", [torch.zeros(3, 3), torch.full((2, 1), float("nan"))], ids=["shape", "nan"])
def test_a_table_of_other_places_is_refused(copy: RunDirectory, table: torch.Tensor) -> None:
    file = copy.path / calibrate.NAME / calibrate.STATISTICS
    write_tensors(file, read_tensors(file) | {"information": table})
    with pytest.raises(DamagedFileError, match=r"'information': got torch.float32 .* expected .* finite numbers"):
        report.gather(copy)
    assert (copy.path / bundle.NAME).is_dir()


def test_a_part_of_a_limit() -> None:
    assert report._part(1.0, 4.0) == 0.25
    assert report._part(None, 4.0) is None
    assert report._part(1.0, None) is None

"""The same policy with weights from different solvers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adatsq_trt.errors import MissingFileError
from adatsq_trt.files import read_json_model
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import compare, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import run_stages
from tests.stages.tiny_run import tiny_context


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    changes = {"formats": ("w4a4", "w8a8"), "targets": (), "simulate": True, "budget_bits": 8.0}
    with tiny_context(tmp_path_factory.mktemp("searched") / "run", **changes) as context:
        run_stages(context, search.NAME)
        yield context


def test_a_run_without_a_search_is_refused(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run") as context, pytest.raises(MissingFileError, match="has no finished search"):
        compare.solver_errors(context)


def test_the_policy_s_own_solver_has_the_error_that_was_reported(searched: Context) -> None:
    errors = compare.solver_errors(searched)
    assert set(errors) == {"policy", "uniform w4a4"}, "w8a8 has a scale per channel already"
    assert set(errors["policy"]) == {
        "GPTQ, Fisher-weighted Hessian",
        "GPTQ, unweighted Hessian",
        "round to nearest",
    }
    assert set(errors["uniform w4a4"]) == {"GPTQ, Fisher-weighted Hessian", "round to nearest per channel"}
    result = read_json_model(search.stage(searched).folder / search.RESULT, SearchResult)
    (uniform,) = (point for point in result.points if point.name == "w4a4")
    assert errors["uniform w4a4"]["GPTQ, Fisher-weighted Hessian"] == pytest.approx(uniform.held_out_error, rel=1e-3)
    chosen = result.points[result.chosen].held_out_error
    assert errors["policy"]["GPTQ, Fisher-weighted Hessian"] == pytest.approx(chosen, rel=1e-3)
    assert all(error > 0 for own in errors.values() for error in own.values())

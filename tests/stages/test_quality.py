"""What cells say beside each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.evaluation.batch import Batch
from adatsq_trt.evaluation.methods import FULL_BITS, FULL_PRECISION
from adatsq_trt.evaluation.scores import Interval, bootstrap
from adatsq_trt.files import write_json_model, write_tensors
from adatsq_trt.stages.evaluate import Cell, Evaluation
from adatsq_trt.stages.quality import Difference, difference, intervals, table, verdict
from tests.stages.test_evaluate import EFFORT
from tests.stages.tiny_run import make_model

COLUMNS = ("a", "a", "b", "b")
VALUES = {FULL_PRECISION: [1.0, 1.0, 1.0, 1.0], "one": [1.0, 1.0, 1.0, 0.0], "other": [0.0, 0.0, 1.0, 0.0]}
NOISE = {FULL_PRECISION: 0.0, "one": 0.01, "other": 0.1}


@pytest.fixture
def cells(tmp_path: Path) -> tuple[Evaluation, dict[str, Cell]]:
    """Cells with known values and pictures at known distances, of a batch with a judge."""
    evaluation = Evaluation(tmp_path, EFFORT.model_copy(update={"samples": 4}), make_model())
    evaluation.__dict__["batch"] = Batch((0, 1, 2, 3), COLUMNS, lambda _: pytest.fail("nothing is judged again"))
    latents = torch.zeros(4, *make_model().adapter.latent_shape)
    found = {}
    for name, values in VALUES.items():
        bits = FULL_BITS if name == FULL_PRECISION else "4/4"
        file = evaluation._file(name, bits)
        tensors = {"latents": latents + NOISE[name], "values": torch.tensor(values, dtype=torch.float64)}
        write_tensors(file.with_suffix(".safetensors"), tensors)
        exact = name == FULL_PRECISION
        psnr = None if exact else float(evaluation.outcomes(name, bits)[1].mean())
        found[name] = Cell(
            model="tiny",
            method=name,
            bits=bits,
            effective_weight_bits=4.25,
            mean_score=float(np.mean(values)),
            scores={},
            psnr_db=psnr,
            samples=4,
            seed=0,
            seconds=1.0,
        )
        write_json_model(file, found[name])
    return evaluation, found


def test_a_difference_is_paired(cells: tuple[Evaluation, dict[str, Cell]]) -> None:
    evaluation, found = cells
    result = difference(evaluation, found["one"], found["other"])
    paired = bootstrap(np.array(VALUES["one"]) - np.array(VALUES["other"]), COLUMNS)
    assert result.score_interval == paired
    assert (result.method, result.other, result.bits) == ("one", "other", "4/4")
    assert result.psnr_interval is not None
    assert result.psnr_interval.value > 0
    assert verdict(result.psnr_interval) == "better", "every picture is nearer"


def test_full_precision_has_no_distance_from_itself(cells: tuple[Evaluation, dict[str, Cell]]) -> None:
    evaluation, found = cells
    result = difference(evaluation, found["one"], found[FULL_PRECISION])
    assert result.psnr_interval is None
    assert result.score == pytest.approx(-0.25)
    score, psnr = intervals(evaluation, found[FULL_PRECISION])
    assert psnr is None
    assert score == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("interval", "word"), [((1, 0.5, 2), "better"), ((-1, -2, -0.5), "worse"), ((1, -1, 3), "tie"), ((0, 0, 0), "tie")]
)
def test_words(interval: tuple[float, float, float], word: str) -> None:
    assert verdict(Interval(*interval)) == word


def test_without_a_judge_there_is_no_score() -> None:
    given = {name: None for name in Difference.model_fields} | {
        "model": "m",
        "bits": "4/4",
        "method": "a",
        "other": "b",
    }
    assert Difference(**given).score_interval is None


def test_a_terminal_shows_a_row_for_each_cell(cells: tuple[Evaluation, dict[str, Cell]]) -> None:
    evaluation, found = cells
    shown = table(evaluation, list(found.values()))
    assert shown.row_count == 3
    assert list(shown.columns[0].cells) == [FULL_PRECISION, "one", "other"]
    heads = [str(column.header) for column in shown.columns]
    assert any("0.750 [" in cell for cell in list(shown.columns[4].cells)[1:2]), heads

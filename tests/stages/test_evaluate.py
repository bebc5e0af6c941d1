"""Cells of an evaluation: measured once, and only beside cells of the same effort."""

import numpy as np
import pytest

from adatsq_trt.errors import MismatchError
from adatsq_trt.evaluation.methods import ABLATIONS, FULL_BITS, FULL_PRECISION, METHODS
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.stages.evaluate import Cell, Effort, Evaluation
from tests.stages.tiny_run import HASH, make_model

EFFORT = Effort(
    model="tiny",
    model_sha256=HASH,
    samples=2,
    seed=0,
    steps=2,
    guidance=2.0,
    calibration_samples=2,
    selection_samples=2,
)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Full precision, and weights rounded to nearest in four and three bits."""
    evaluation = Evaluation(tmp_path_factory.mktemp("evaluation"), EFFORT, make_model())
    for name, bits in ((FULL_PRECISION, FULL_BITS), ("rtn", "4/4"), ("rtn", "3/3")):
        evaluation.cell(METHODS[name], bits)
    return evaluation


def test_fewer_bits_are_further_from_full_precision(evaluation: Evaluation) -> None:
    exact, four, three = (
        evaluation.cell(METHODS[name], bits)
        for name, bits in ((FULL_PRECISION, FULL_BITS), ("rtn", "4/4"), ("rtn", "3/3"))
    )
    assert (exact.psnr_db, exact.effective_weight_bits) == (None, 16.0)
    assert four.psnr_db is not None
    assert three.psnr_db is not None
    assert four.psnr_db > three.psnr_db > 0
    assert 3 < three.effective_weight_bits < 4 < four.effective_weight_bits < 5
    assert (four.mean_score, four.scores) == (None, {}), "nobody judges an unknown world"
    assert evaluation.images("rtn", "4/4").shape[0] == EFFORT.samples


def test_psnr_is_of_the_pictures(evaluation: Evaluation) -> None:
    own, exact = evaluation.images("rtn", "4/4"), evaluation.images(FULL_PRECISION, FULL_BITS)
    error = np.square(own.astype(np.float64) - exact).reshape(len(own), -1).mean(axis=1)
    assert evaluation.outcomes("rtn", "4/4")[1] == pytest.approx(-10 * np.log10(error))


def test_a_cell_that_is_there_is_read(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluation, "_generate", lambda *_: pytest.fail("it was measured again"))
    file = evaluation._file("rtn", "4/4")
    assert evaluation.has(METHODS["rtn"], "4/4")
    assert not evaluation.has(METHODS["quarot"], "4/4")
    before = read_json_model(file, Cell)
    try:
        write_json_model(file, before.model_copy(update={"seconds": 1e6}))
        assert evaluation.cell(METHODS["rtn"], "4/4").seconds == 1e6
    finally:
        write_json_model(file, before)


def test_other_effort_is_refused_by_what_differs(evaluation: Evaluation) -> None:
    folder = evaluation._folder
    Evaluation(folder, EFFORT, make_model())
    with pytest.raises(MismatchError, match="holds cells with samples 2, this evaluation has 3"):
        Evaluation(folder, EFFORT.model_copy(update={"samples": 3}), make_model())


def test_searches_that_differ_have_runs_of_their_own(evaluation: Evaluation) -> None:
    searched = [method for method in (METHODS | ABLATIONS).values() if method.searched is not None]
    keys = {}
    for method in searched:
        for bits in method.searched or ():
            said = (method.searched[bits], method.transform, method.weights, method.beam, bits)  # type: ignore[index]
            keys.setdefault(evaluation.run_of(method, bits), set()).add(said)
    assert all(len(said) == 1 for said in keys.values())

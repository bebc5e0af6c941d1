"""`evaluate` as a user meets it, and `--transform`."""

import json
from pathlib import Path

import pytest

SMALL = ("--samples", "6", "--steps", "2", "--calibration-samples", "2", "--selection-samples", "2")


def evaluate(cli, folder: Path, methods: str, *more: str):  # type: ignore[no-untyped-def]
    ended = cli("evaluate", "scenes-flux-schnell", "--methods", methods, *SMALL, *more, "-o", folder, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


KEYS = {"model", "method", "bits", "effective_weight_bits", "mean_score", "scores", "psnr_db", "samples", "seed"} | {
    *("resident_weight_bits", "activation_bits", "proposal", "mean_error_psnr_db", "worst_psnr_db")
}


@pytest.mark.slow
def test_all_methods_side_by_side_and_again(cli, tmp_path: Path) -> None:
    cells = evaluate(cli, tmp_path, "all")
    rivals = ("rtn", "smoothquant", "svdquant", "quarot", "viditq")
    methods = (*rivals, "adatsq", "adatsq-fine", "adatsq-best")
    expected = [("fp16", "16/16"), *((method, bits) for bits in ("4/4", "3/3") for method in methods)]
    assert [(cell["method"], cell["bits"]) for cell in cells] == expected
    assert all(set(cell) == KEYS | {"seconds"} for cell in cells)
    by_name = {(cell["method"], cell["bits"]): cell for cell in cells}
    assert by_name["fp16", "16/16"]["psnr_db"] is None
    assert by_name["rtn", "4/4"]["psnr_db"] > by_name["rtn", "3/3"]["psnr_db"] > 0
    assert by_name["rtn", "4/4"]["effective_weight_bits"] == 4.25
    assert by_name["svdquant", "4/4"]["effective_weight_bits"] > 4.5, "the branch counts"
    assert by_name["rtn", "4/4"]["resident_weight_bits"] == 4.25
    for cell in cells:
        assert cell["resident_weight_bits"] >= cell["effective_weight_bits"]
        if cell["psnr_db"] is not None:
            # A few samples that are lost weigh as much as they err.
            assert cell["mean_error_psnr_db"] <= cell["psnr_db"] + 1e-9
    before = cli.state(tmp_path / "cells")
    assert evaluate(cli, tmp_path, "all") == cells
    assert cli.state(tmp_path / "cells") == before, "finished cells are not touched"


def test_a_missing_cell_alone_is_made_again(cli, tmp_path: Path) -> None:
    cells = evaluate(cli, tmp_path, "rtn,quarot", "--bits", "4/4")
    (tmp_path / "cells" / "quarot-4-4.json").unlink()
    kept = cli.state(tmp_path / "cells" / "rtn-4-4.json")
    again = evaluate(cli, tmp_path, "rtn,quarot", "--bits", "4/4")
    assert [{**cell, "seconds": 0} for cell in again] == [{**cell, "seconds": 0} for cell in cells]
    assert cli.state(tmp_path / "cells" / "rtn-4-4.json") == kept


def test_other_options_need_another_folder(cli, tmp_path: Path) -> None:
    evaluate(cli, tmp_path, "fp16", "--bits", "4/4")
    refusal = cli("evaluate", "scenes-flux-schnell", *SMALL, "--seed", "1", "-o", tmp_path).refusal
    assert refusal == (
        f"'{tmp_path}' holds cells with seed 0, this evaluation has 1; choose another --output or the same options"
    )


def test_a_model_without_a_judge_gets_psnr_only(cli, tmp_path: Path) -> None:
    ended = cli("evaluate", "digits-flux", "--methods", "rtn", "--bits", "4/4", *SMALL, "-o", tmp_path, "--json")
    assert ended.code == 0, ended.err
    exact, rtn = json.loads(ended.out)
    assert exact["mean_score"] is None is rtn["mean_score"]
    assert rtn["psnr_db"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "rtm"), "unknown method 'rtm'"),
        (("--bits", "5/5"), "--bits 5/5: expected 4/4 or 3/3, or both with a comma between"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(cli, tmp_path: Path, options: tuple[str, str], message: str) -> None:
    assert message in cli("evaluate", "scenes-flux-schnell", *options, "-o", tmp_path / "new").refusal
    assert not (tmp_path / "new").exists()


def test_a_transform_of_a_simulated_run_is_not_exported(cli, tmp_path: Path) -> None:
    run, sample = tmp_path / "run", ("--transform", "smooth", *cli.small, "-o", tmp_path / "run")
    assert cli("build", "engine", "digits-flux", "--simulate", *sample).refusal == (
        "--transform smooth: with --simulate inputs are rotated as a whole and divided by any number, which exported "
        "graphs do not hold; run 'adatsq-trt search' with these options, which ends before the export, or leave out "
        "--simulate"
    )
    assert not run.exists()

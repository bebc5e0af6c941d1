"""What runs on two devices have in common."""

from pathlib import Path

import pytest

from adatsq_trt.cli.stages import search
from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.search.select import SearchResult


def assert_alike(here: Path, there: Path, precision: float) -> None:
    """The same files; full precision agrees, and what was chosen is as good.

    A number between two points of a grid may be rounded to either, so that quantized latents differ by more.
    """
    files = {file.relative_to(here) for file in here.rglob("*.safetensors")}
    assert files == {file.relative_to(there) for file in there.rglob("*.safetensors")}
    exact = [file for file in files if file.parts[0] == "calibrate" or file.name.startswith("full_precision")]
    assert len(exact) >= 10
    for file in exact:
        found = read_tensors(there / file)
        for name, tensor in read_tensors(here / file).items():
            error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-30)
            assert float(error) < precision, f"{file}: {name}"
    results = [read_json_model(run / search.NAME / search.RESULT, SearchResult) for run in (here, there)]
    errors = [result.points[result.chosen].held_out_error for result in results]
    assert errors[0] is not None
    assert errors[1] == pytest.approx(errors[0], rel=0.1)

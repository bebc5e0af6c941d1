"""What runs on two devices have in common."""

from pathlib import Path

import pytest
from torch import Tensor

from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import search

# Share of a weight's codes that may be rounded to the other of two points.
_FLIPPED = 0.03
BUDGET_BITS = 8.0  # of the runs


def assert_alike(here: Path, there: Path, precision: float) -> None:
    """The same files; full precision and nearly all codes agree, errors are alike, and the best policy was chosen.

    A number between two points of a grid may be rounded to either, so that quantized latents differ by more. So do the
    policies that the search proposes, each of which has a file of scores.
    """
    files, others = (
        {file.relative_to(run) for file in run.rglob("*.safetensors") if file.parent.name != "scores"}
        for run in (here, there)
    )
    assert files == others
    kinds = set()
    for file in files:
        kind = "calibrate" if file.name.startswith("full_precision") else file.parts[0]
        found = read_tensors(there / file)
        for name, tensor in read_tensors(here / file).items():
            if kind == "calibrate":
                kinds.add(kind)
                assert relative_error(found[name], tensor) < precision, f"{file}: {name}"
            elif name.endswith(".codes"):
                kinds.add("codes")
                flipped = (found[name].float() != tensor.float()).float().mean()
                assert float(flipped) < _FLIPPED, f"{file}: {name}"
    assert kinds == {"calibrate", "codes"}
    results = [read_json_model(run / search.NAME / search.RESULT, SearchResult) for run in (here, there)]
    for result in results:
        rivals = [p for p in result.points if p.mean_bits <= BUDGET_BITS + 1e-9]
        own = result.points[result.searched]
        assert own.rank_error == min(p.rank_error for p in rivals if p.samples == own.samples)
    # Two policies that nearly tie may change places, so a policy is compared that both runs have measured.
    errors = [next(p.held_out_error for p in result.points if p.kind == "uniform") for result in results]
    assert errors[0] is not None
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))

"""A search whose choice something simple beats."""

from collections.abc import Sequence

import pytest

from adatsq_trt.files import read_json_model
from adatsq_trt.search.select import Point, Proposal, SearchResult
from adatsq_trt.stages import judging, search
from adatsq_trt.stages.context import Context
from adatsq_trt.zoo.loading import load_model


@pytest.mark.parametrize("weights", ["once", "free"])
def test_a_policy_that_something_simple_beats_is_not_returned(
    cli, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """A search whose choice went wrong: 8 bits for larger layers and 3 for others, where 5 everywhere is better."""
    run = tmp_path_factory.getbasetemp() / "dominated"  # calibration and weights are made once
    uniforms, best = search._uniforms, judging.Judging._best

    layers = load_model("digits-flux").adapter.quantizable_layers().values()
    sizes = [layer.in_features * layer.out_features for layer in layers]
    row = tuple(2 if size > min(sizes) else 0 for size in sizes)

    def with_a_bad_plan(context: Context) -> list[Proposal]:
        return [*uniforms(context), Proposal("plan", (row,) * context.settings.steps)]

    def worst(self: judging.Judging, points: list[Point], among: Sequence[int]) -> tuple[list[Point], int]:
        own = [i for i, p in enumerate(points) if p.kind == "plan" and set(p.formats[0]) == {"w3a3", "w8a8"}]
        return best(self, points, among)[0], own[-1]

    monkeypatch.setattr(search, "_uniforms", with_a_bad_plan)
    monkeypatch.setattr(judging.Judging, "_best", worst)
    options = ("--simulate", "--formats", "w3a3,w5a5,w8a8", "--budget-bits", "8", "--weights", weights, *cli.small)
    ended = cli("search", "digits-flux", *options, "--selection-samples", "8", "--output", run)
    assert ended.code == 0, ended.err
    found = read_json_model(run / "search" / "result.json", SearchResult)
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

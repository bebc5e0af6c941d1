"""The hardware table: its peers on a small model, and the comparison, recomputed from the rows that were measured."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from adatsq_trt.calibration.fisher import LayerGradients
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.transforms.low_rank import rank_of
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.calibration.units import Measured
from adatsq_trt.formats import Element, format_named
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.policy import LayerShape
from adatsq_trt.quantizers import dequantize_weight, fake_quantize_activation, quantize_nearest
from adatsq_trt.search.costs import CARDS, TimeModel
from adatsq_trt.search.sensitivity import Candidates
from benchmarks.hardware import peers
from benchmarks.hardware.cells import Cells, picture_figures
from benchmarks.hardware.costs import INT4_TOPS, svdquant_costs
from benchmarks.hardware.methods import FORMATS, methods, named
from benchmarks.hardware.rows import ASSIGNMENTS, Effort, Figure, Results, Row, compare, dominated, within
from benchmarks.hardware.run import FOLDER, IN_README, MODELS, README, collect, read
from benchmarks.hardware.tables import short_table, tables
from tests.tiny_flux import make_tiny_flux

PAGE = FOLDER.parents[1] / "docs" / "quality.md"

# ------------------------------------------------------------------------------------------- what was measured


@pytest.fixture(scope="module")
def measured() -> tuple[Results, dict[str, np.ndarray]]:
    return read(FOLDER)


def test_every_row_is_there_or_named_as_missing(measured: tuple[Results, dict[str, np.ndarray]]) -> None:
    results, errors = measured
    told = [f"{r.model} {r.target} {r.method}" for r in results.rows] + [*results.missing, *results.impossible]
    wanted = [f"{model} {target} {m.name}" for model in MODELS for target in FORMATS for m in methods(target)]
    assert sorted(told) == sorted(wanted)
    assert results.rows
    assert {row.key for row in results.rows} == set(errors)


def test_figures_are_those_of_the_samples(measured: tuple[Results, dict[str, np.ndarray]]) -> None:
    results, errors = measured
    counts = {effort.model: effort.samples for effort in results.efforts}
    for row in results.rows:
        assert len(errors[row.key]) == counts[row.model]
        for name, figure in picture_figures(errors[row.key]).items():
            assert getattr(row, name).model_dump() == pytest.approx(figure.model_dump(), abs=1e-3), (row.key, name)


def test_comparisons_are_those_of_the_rows(measured: tuple[Results, dict[str, np.ndarray]]) -> None:
    results, errors = measured
    again = compare(results.rows, errors)
    for told, own in zip(results.comparisons, again, strict=True):
        assert (told.model, told.target, told.peer, told.ours) == (own.model, own.target, own.peer, own.ours)
        assert told.ratio.model_dump() == pytest.approx(own.ratio.model_dump(), rel=1e-6)
        difference = own.psnr_difference_db.model_dump()
        assert told.psnr_difference_db.model_dump() == pytest.approx(difference, abs=1e-5)
        assert told.closer == own.closer
        ratio = told.ratio
        assert told.verdict == ("below" if ratio.high < 1 else "above" if ratio.low > 1 else "tie")
    assert results.dominated == dominated(results.rows, errors)


def test_ours_costs_no_more_than_its_peer_and_every_peer_has_one(
    measured: tuple[Results, dict[str, np.ndarray]],
) -> None:
    results, _ = measured
    rows = {(row.model, row.target, row.method): row for row in results.rows}
    compared = {(c.model, c.target, c.peer) for c in results.comparisons}
    for c in results.comparisons:
        ours, peer = rows[c.model, c.target, c.ours], rows[c.model, c.target, c.peer]
        assert within(ours, peer)
        assert ours.engines <= ASSIGNMENTS
    for row in results.rows:
        if row.most_assignments is not None:
            assert row.engines <= row.most_assignments
        if row.kind == "peer" and (row.model, row.target, row.method) not in compared:
            names = [m.name for m in methods(row.target) if m.most_assignments == ASSIGNMENTS]
            open_ones = {f"{row.model} {row.target} {name}" for name in names}
            assert open_ones & {*results.missing, *results.impossible}, f"{row.key} was left out"


def test_the_pages_show_these_results(measured: tuple[Results, dict[str, np.ndarray]]) -> None:
    for page, expected in ((PAGE, tables(measured[0])), (README, short_table(measured[0], *IN_README))):
        shown = page.read_text().partition("<!-- hardware:begin -->")[2].partition("<!-- hardware:end -->")[0]
        assert shown.strip() == expected.strip(), page


# ------------------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize(("steps", "kept"), [(50, (0, 1, 2, 3, 49)), (25, (0, 1, 24)), (4, (0, 3)), (1, (0,))])
def test_users_protect_the_first_four_of_fifty_steps_and_the_last(steps: int, kept: tuple[int, ...]) -> None:
    assert peers.protected_steps(steps) == kept


@pytest.mark.parametrize("mean", [4.5, 5.0, 6.2, 8.0])
def test_autoquantize_finds_the_least_sum_of_scores_within_its_bits(mean: float) -> None:
    rng = np.random.default_rng(0)
    low = rng.exponential(size=7)
    choice = peers.LayerChoice(np.stack([low, 0.1 * low]), (4.5, 8.0), rng.integers(1, 20, 7) * 256)
    chosen = choice.allocate(mean)
    places = np.arange(7)

    def cost(formats: np.ndarray) -> float:
        return float((np.array(choice.bits)[formats] * choice.weights).sum() / choice.weights.sum())

    every = [np.array(formats) for formats in product(range(2), repeat=7)]
    best = min(choice.scores[f, places].sum() for f in every if cost(f) <= mean + 1e-9)
    assert cost(chosen) <= mean + 1e-9
    assert choice.scores[chosen, places].sum() == pytest.approx(best)


def outlying_group() -> tuple[LayerGroup, torch.Tensor]:
    """Two layers that are given one input with a few large channels, at two steps; and 64 rows of it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(128)
    sizes[::16] = 30.0
    x = torch.randn(2, 64, 128, generator=generator) * sizes
    weights = {name: torch.randn(96, 128, generator=generator) / 11 for name in ("q", "k")}
    return LayerGroup(weights, x.abs().amax(dim=1)), x


@pytest.mark.parametrize("name", ["nvfp4", "w4a4g64"])
def test_svdquant_smooths_as_errs_least_with_rounded_inputs(name: str) -> None:
    (group, x), fmt = outlying_group(), format_named(name)
    found = peers._smoothed(group, x, fmt)
    maps = {id(transform.input_map) for transform in found.values()}
    assert len(maps) == 1, "layers with one input share its divisor"
    divisor = found["q"].input_map.divisor
    assert divisor is not None
    assert divisor[0] > 1.5 * divisor[1], "outliers move into the weight"
    branch = found["q"].branch
    assert branch is not None
    assert branch.rank == rank_of(128, 96)

    def error(strengths: tuple[float, ...]) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers, "STRENGTHS", strengths)
            own = peers._smoothed(group, x, fmt)
        return sum(peers._output_error(group, n, own[n], x, fmt) for n in own)

    least = error(peers.STRENGTHS)
    assert least <= min(error((0.5,)), error(()))
    assert least < 0.8 * error(()), "smoothing pays here"


def test_autoquantize_scores_squares_of_single_outputs(tiny_layers: tuple[Candidates, Samples, LayerGradients]) -> None:
    """Not the square of their sum, which the search's own sensitivity is made of."""
    extra, samples, layers = tiny_layers
    found = peers.squared_changes(Measured(samples, extra), layers)
    adapter = samples.adapter
    for layer, linear in adapter.quantizable_layers().items():
        x, weight = layers.inputs[layer], linear.weight.detach()
        for fmt, score in zip(extra.formats, found[layer], strict=True):
            own = dequantize_weight(extra.store.weights[fmt.name][layer], fmt)
            change = functional.linear(fake_quantize_activation(x, fmt.activation), own) - functional.linear(x, weight)
            expected = (layers.gradients[layer] * change).square().sum().detach()
            assert float(score) == pytest.approx(float(expected), rel=1e-3)


@pytest.fixture
def tiny_layers() -> tuple[Candidates, Samples, LayerGradients]:
    """A tiny Flux, its layers in two formats with dynamic scales, and random inputs and gradients of theirs."""
    adapter, generator = make_tiny_flux(width=16, patches=2), torch.Generator().manual_seed(0)
    formats = (format_named("w4a4"), format_named("w8a8"))
    linears = adapter.quantizable_layers()
    store = CandidateWeights(
        {f.name: {n: quantize_nearest(linear.weight.detach(), f) for n, linear in linears.items()} for f in formats}, {}
    )
    inputs = {n: torch.randn(2, 5, linear.in_features, generator=generator) for n, linear in linears.items()}
    gradients = {n: torch.randn(3, 2, 5, linear.out_features, generator=generator) for n, linear in linears.items()}
    samples = Samples(adapter, adapter.schedule(2), 1.0, (0, 1), (0, 1))
    return Candidates(formats, store), samples, LayerGradients(0, inputs, gradients)


def test_svdquants_branch_costs_its_operations_and_its_matrices() -> None:
    fmt, shape, card = format_named("nvfp4"), LayerShape("a", 3072, 3072, 4608), CARDS["rtx-5090"]
    costs = svdquant_costs(fmt, [shape], [shape], card, 10, 1.0)
    weights = 3072 * 3072 * 4.5 / 8
    assert rank_of(3072, 3072) == 32
    assert costs.resident_bytes == round(weights + 2 * 32 * 6144 + 2 * 3072)
    branch = 2 * 4608 * 32 * 6144 / (card.tops[Element.BF16] * 1e9)
    assert costs.ms == pytest.approx(10 * (TimeModel(card=card).layer_ms(fmt, shape) + branch) + 1)
    assert costs.activation_bits == 4.5
    # Few rows are bound by memory, where the matrices count and operations do not.
    few = LayerShape("a", 3072, 3072, 1)
    moved = weights + 2 * 32 * 6144 + 3072 * 4.5 / 8 + 2 * 3072
    assert svdquant_costs(fmt, [few], [few], card, 1, 0.0).ms == pytest.approx(moved / card.memory_gbs / 1e6)
    older, integers = CARDS["rtx-4090"], format_named("w4a4g64")
    computed = 2 * 4608 * 3072**2 / (INT4_TOPS["rtx-4090"] * 1e9) + 2 * 4608 * 32 * 6144 / (
        older.tops[Element.BF16] * 1e9
    )
    assert svdquant_costs(integers, [shape], [shape], older, 1, 0.0).ms == pytest.approx(computed)


# ------------------------------------------------------------------------------------------------------ cells

EFFORT = Effort(
    model="digits-flux",
    model_sha256="0" * 64,
    steps=2,
    guidance=1.0,
    samples=8,
    calibration_samples=4,
    selection_samples=4,
    projections=1,
)


@pytest.mark.usefixtures("small_zoo")
def test_cells_are_measured_once_and_a_search_keeps_its_peers_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, known = Cells(tmp_path, EFFORT, "sm120"), named("sm120")
    peer, ours = "svdquant", f"ours, {ASSIGNMENTS} engines, as svdquant"
    for name in ("bf16", "modelopt nvfp4 max", peer, ours, "ours, layer-only, as svdquant"):
        cells.measure(known[name])
    with monkeypatch.context() as patch:
        patch.setattr(Cells, "_measured", lambda *_: pytest.fail("it was measured again"))
        rows = {name: cells.measure(known[name]) for name in ("bf16", "modelopt nvfp4 max", peer, ours)}
    assert rows["bf16"].resident == 1.0
    assert rows["bf16"].psnr_of_mean_db.value > 5 + rows["modelopt nvfp4 max"].psnr_of_mean_db.value
    assert within(rows[ours], rows[peer])
    assert rows[peer].resident_bytes > rows["modelopt nvfp4 max"].resident_bytes, "the branch has bytes"
    results, errors = collect({("digits-flux", "sm120"): cells}, {})
    assert [(c.peer, c.ours) for c in results.comparisons] == [(peer, ours)]
    assert len(results.rows) + len(results.missing) == len(known)
    assert compare(results.rows, errors) == results.comparisons
    assert f"| {ours} |" in tables(results)


def test_a_policy_that_another_beats_everywhere_is_named() -> None:
    figure = Figure(value=1.0, low=1.0, high=1.0)
    figures = dict.fromkeys(("psnr_of_mean_db", "psnr_db", "worst_psnr_db"), figure)
    common = {"model": "m", "target": "t", "resident": 0.3, "engines": 1, "activation_bits": 4.0, "score": None}

    def row(name: str, kind: str, size: int, ms: float) -> Row:
        return Row(**common, **figures, method=name, kind=kind, resident_bytes=size, ms=ms, seconds=0.0)  # type: ignore[arg-type]

    rows = [row("ours", "ours", 100, 1.0), row("dear", "peer", 101, 0.5), row("good", "peer", 100, 1.0)]
    draws = np.random.default_rng(0).exponential(size=64)
    errors = {"m/t/ours": draws, "m/t/dear": 0.1 * draws, "m/t/good": 0.5 * draws}
    assert [d.by for d in dominated(rows, errors)] == ["good"]
    errors["m/t/good"] = draws
    assert dominated(rows, errors) == ()

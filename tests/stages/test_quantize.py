"""Stage `quantize`: every layer in every candidate format, once."""

from pathlib import Path

import pytest
import torch

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import FORMATS
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest, static_activation_scale
from adatsq_trt.stages import calibrate, quantize
from adatsq_trt.stages.context import Context
from adatsq_trt.transforms import IDENTITY
from tests.stages.tiny_run import tiny_context


def assert_equal(one: QuantizedWeight, other: QuantizedWeight) -> None:
    assert torch.equal(one.codes, other.codes)
    for scale, own in ((one.scales, other.scales), (one.global_scale, other.global_scale)):
        assert (scale is None and own is None) or torch.equal(scale, own)


def test_integers_are_solved_with_the_layer_s_hessian_and_floats_rounded(finished: Context) -> None:
    store, hessians = quantize.load(finished), calibrate.load_hessians(finished)
    for name, linear in finished.adapter.quantizable_layers().items():
        weight, fmt = linear.weight.detach(), FORMATS["w8a8s"]
        assert_equal(store.weights["w8a8s"][name], gptq(weight, hessians[name], fmt, damping=finished.settings.damping))
        assert_equal(store.weights["fp32"][name], quantize_nearest(weight, FORMATS["fp32"]))


def test_static_scales_are_those_of_the_largest_inputs(finished: Context) -> None:
    largest = read_tensors(calibrate.stage(finished).folder / calibrate.STATISTICS)["largest"]
    scales = quantize.load(finished).scales
    assert set(scales) == {"w8a8s"}
    torch.testing.assert_close(scales["w8a8s"], static_activation_scale(largest, FORMATS["w8a8s"].activation))


def test_formats_with_one_weight_grid_share_the_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 64, generator=generator), torch.randn(200, 64, generator=generator)
    solver = quantize.Solver((FORMATS["w8a8s"], FORMATS["w4a4"], FORMATS["int4wo"]), 0.01)
    problem = quantize.Problem(weight, x.mT @ x / 200, IDENTITY)
    solved = quantize.solve_layer(solver, problem)
    assert list(solved) == list(solver.formats)
    for fmt in solver.formats:
        assert_equal(solved[fmt], gptq(weight, problem.hessian, fmt, damping=0.01))
    same = [fmt for fmt in FORMATS.values() if fmt.weight == FORMATS["w4a4"].weight]
    shared = quantize.solve_layer(quantize.Solver(tuple(same), 0.01), problem)
    assert len(same) > 1
    assert len({id(weight) for weight in shared.values()}) == 1


def test_a_transform_is_applied_before_and_kept(tmp_path: Path) -> None:
    changes = {"transform": "smooth", "simulate": True, "targets": (), "formats": ("w4a4",), "format_set": "w4a4"}
    with tiny_context(tmp_path / "run", **changes) as context:
        calibrate.run(context)
        assert quantize.run(context).done
        transforms, hessians = quantize.load_layer_transforms(context), calibrate.load_hessians(context)
        assert set(transforms) == set(context.layers)
        name = context.layers[0]
        weight = context.adapter.quantizable_layers()[name].weight.detach()
        own = gptq(
            transforms[name].rounded_weight(weight),
            transforms[name].input_map.second_moment(hessians[name]),
            FORMATS["w4a4"],
            damping=context.settings.damping,
        )
        assert_equal(quantize.load(context).weights["w4a4"][name], own)


def test_a_weight_is_written_once_for_all_activation_formats(tmp_path: Path) -> None:
    names = ("w4a4", "w8a8", "w4a6", "w4a3")
    changes = {"simulate": True, "targets": (), "formats": names, "format_set": ",".join(names), "clips": "none"}
    with tiny_context(tmp_path / "run", **changes) as context:
        calibrate.run(context)
        folder = quantize.run(context).folder
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["w4a4", "w8a8"]
        store = quantize.load(context)
        for layer in context.layers:
            for name in ("w4a6", "w4a3"):
                assert_equal(store.weights[name][layer], store.weights["w4a4"][layer])


@pytest.mark.parametrize(("changes", "done"), [({"beam": 9}, True), ({"damping": 0.1}, False)])
def test_the_damping_counts_and_the_search_does_not(finished: Context, changes: dict[str, float], done: bool) -> None:
    settings = finished.settings.model_copy(update=changes)
    assert quantize.stage(Context(finished.run, settings, finished.model)).done is done

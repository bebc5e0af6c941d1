"""The budgets of a search."""

from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.errors import BudgetError
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import Policy, resident_weight_bytes
from adatsq_trt.search.costs import time_model
from adatsq_trt.stages import budget, calibrate
from adatsq_trt.stages.context import Context, layer_shapes
from tests.stages.tiny_run import make_model, make_settings, tiny_context

GPU = {"formats": ("fp8", "bf16"), "targets": ("sm89",), "budget_bits": None, "weights": "free"}
_, ADA = time_model("rtx-4090")


@pytest.mark.parametrize(
    ("changes", "wanted"), [({}, False), ({"budget_bytes": 1.0}, True), ({"budget_ms": 1.0}, True)]
)
def test_bits_alone_are_no_penalty(changes: dict[str, float], wanted: bool) -> None:
    assert budget.penalty(make_settings(**changes)) is wanted


@pytest.mark.parametrize(
    ("weights", "formats", "wanted"),
    [
        ("once", ("w8a8s", "fp32"), True),
        ("free", ("w8a8s", "fp32"), False),
        ("once", ("w8a8s",), False),
        ("once", ("w8a8s", "w8a8"), False),
    ],
)
def test_weights_are_chosen_where_there_are_several_grids(weights: str, formats: tuple[str, ...], wanted: bool) -> None:
    assert budget.chooses_weights(make_settings(weights=weights, formats=formats)) is wanted


def test_shapes_have_the_rows_that_calibration_counted(finished: Context) -> None:
    shapes = {shape.name: shape for shape in budget.shapes_of(finished)}
    assert tuple(shapes) == finished.layers
    linears = finished.adapter.quantizable_layers()
    for name, shape in shapes.items():
        assert (shape.in_features, shape.out_features) == (linears[name].in_features, linears[name].out_features)
    # 16 patches and one token of text, with both branches of guidance; modulation is not among the layers.
    assert shapes["transformer_blocks.0.attn.to_q"].tokens == 2 * 16
    assert shapes["transformer_blocks.0.attn.add_q_proj"].tokens == 2
    assert shapes["single_transformer_blocks.0.attn.to_q"].tokens == 2 * 17


def test_a_policy_takes_the_time_of_its_layers_and_of_the_rest(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run", **GPU, budget_ms=1.0, times=ADA) as context:
        calibrate.run(context)
        times = budget.sample_times(context)
        assert times is not None
        rows = [["fp8"] * len(context.layers), ["bf16"] * len(context.layers)]
        layers = sum(times.model.layer_ms(FORMATS[name], shape) for name in ("fp8", "bf16") for shape in times.shapes)
        assert times.rest_ms > 0
        policy = Policy.from_steps("tiny", "0" * 64, context.layers, rows)
        assert times.policy_ms(policy) == pytest.approx(layers + 2 * times.rest_ms)
        with pytest.raises(BudgetError, match=r"--budget-ms 1e-09: the fastest policy of these formats takes"):
            budget.budgets(_with(context, budget_ms=1e-9))
        found = budget.budgets(context)
        assert [additive.unit for additive in found.additive] == ["ms"]
        assert found.additive[0].limit == pytest.approx(1.0 - 2 * times.rest_ms)


def _with(context: Context, **changes: float) -> Context:
    settings = context.settings.model_copy(update=changes)
    return Context(context.run, settings, context.model)


def test_nobody_asks_for_times(finished: Context) -> None:
    assert budget.sample_times(finished) is None
    found = budget.budgets(finished)
    (bits,) = found.additive
    layers, steps = len(finished.layers), finished.settings.steps
    assert bits.limit == 20.0 * layers * steps
    assert np.array_equal(bits.cost, [[8.0] * layers, [32.0] * layers])
    assert found.storage is not None, "a layer keeps one of two weight formats"


def test_fewer_bytes_than_the_smallest_weights_have_are_refused_by_that_number() -> None:
    adapter = make_model().adapter
    layers = adapter.quantizable_layers()
    smallest = Policy.from_steps("tiny", "0" * 64, list(layers), [["w8a8s"] * len(layers)])
    shapes = {shape.name: shape for shape in layer_shapes(adapter, dict.fromkeys(layers, 1))}
    least = resident_weight_bytes(smallest, shapes)
    budget.require_bytes(make_settings(budget_bytes=float(least)), adapter)
    with pytest.raises(BudgetError, match=rf"the smallest weights of these formats have {least} bytes"):
        budget.require_bytes(make_settings(budget_bytes=least - 1.0), adapter)
    budget.require_bytes(make_settings(), adapter)

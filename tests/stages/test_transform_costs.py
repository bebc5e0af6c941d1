"""What a transform adds to the bytes and the milliseconds of every policy."""

import pytest

from adatsq_trt.calibration.transforms.low_rank import rank_of
from adatsq_trt.errors import BudgetError
from adatsq_trt.search.costs import stored_time_model, time_model
from adatsq_trt.stages import budget, calibrate
from adatsq_trt.stages.context import Context, layer_shapes
from adatsq_trt.stages.transform_costs import transform_costs
from tests.stages.tiny_run import make_model, make_settings, tiny_context

_, ADA = time_model("rtx-4090")
GPU = {"formats": ("fp8", "bf16"), "targets": ("sm89",), "times": ADA}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    with tiny_context(tmp_path_factory.mktemp("plain") / "run", **GPU) as context:
        calibrate.run(context)
        yield context


def with_transform(context: Context, name: str | None, **changes) -> Context:
    settings = context.settings.model_copy(update={"transform": name, **changes})
    return Context(context.run, settings, context.model)


def test_without_a_transform_nothing_is_added(plain: Context) -> None:
    assert transform_costs(plain, budget.shapes_of(plain), stored_time_model(ADA)) is None
    assert budget.account(plain).transform is None


def test_branches_divisors_and_rotations_are_counted_once_each(plain: Context) -> None:
    shapes = budget.shapes_of(plain)
    # q, k and v of image and of text, two outputs, two feed-forward networks; the single block's input and output.
    inputs = [64, 64, 64, 64, 64, 256, 64, 256, 64, 320]
    branches = sum(2 * rank_of(s.in_features, s.out_features) * (s.in_features + s.out_features) for s in shapes)
    wanted = {
        "smooth": 2 * sum(inputs),
        "hadamard": 2 * (64**2 + 128**2),
        "balance": 2 * sum(inputs) + 2 * (64**2 + 128**2),
        "low-rank": 2 * sum(inputs) + branches,
    }
    for name, size in wanted.items():
        found = transform_costs(with_transform(plain, name), shapes, None)
        assert found is not None
        assert (found.name, found.bytes, found.ms) == (name, size, None)


def test_every_policy_has_them_and_budgets_leave_room_for_them(plain: Context) -> None:
    shapes, rows = budget.shapes_of(plain), [(0,) * len(plain.layers)] * plain.settings.steps
    before = budget.account(plain)
    after = budget.account(with_transform(plain, "balance-low-rank"))
    added = after.transform
    assert added is not None
    assert added.bytes > 0
    assert added.ms is not None
    assert added.ms > 0
    own, other = before.costs.costs(rows), after.costs.costs(rows)
    assert other.resident_bytes == own.resident_bytes + added.bytes
    assert other.ms == pytest.approx(own.ms + added.ms)
    limit = float(other.resident_bytes)
    tight = budget.account(with_transform(plain, "balance-low-rank", budget_bytes=limit, budget_bits=None))
    assert tight.budgets.holds(rows)
    with pytest.raises(BudgetError, match=rf"--budget-size .*have {other.resident_bytes} bytes"):
        budget.account(with_transform(plain, "balance-low-rank", budget_bytes=limit - 1.0, budget_bits=None))
    assert len(shapes) == len(plain.layers)


def test_time_grows_with_what_is_done(plain: Context) -> None:
    shapes, model = budget.shapes_of(plain), stored_time_model(ADA)
    ms = {}
    for name in ("smooth", "hadamard", "balance", "balance-low-rank"):
        found = transform_costs(with_transform(plain, name), shapes, model)
        assert found is not None
        ms[name] = found.ms
    assert ms["balance"] == pytest.approx(ms["smooth"] + ms["hadamard"])
    assert ms["balance-low-rank"] > ms["balance"]


def test_a_budget_without_room_for_branches_is_refused_before_anything_runs() -> None:
    adapter, common = make_model().adapter, {"budget_bits": None, "transform": "low-rank"}
    shapes = layer_shapes(adapter, dict.fromkeys(adapter.quantizable_layers(), 1))
    branches = sum(2 * rank_of(s.in_features, s.out_features) * (s.in_features + s.out_features) for s in shapes)
    weights = sum((8 + 16 / s.in_features) / 8 * s.in_features * s.out_features for s in shapes)
    budget.require_bytes(make_settings(budget_bytes=weights + branches, **common), adapter)
    with pytest.raises(BudgetError, match="--budget-size"):
        budget.require_bytes(make_settings(budget_bytes=weights + branches - 1, **common), adapter)

"""Budgets in bits, bytes and milliseconds on the model of digits: each is kept, and they lead to different policies."""

import json
from pathlib import Path

import pytest

from adatsq_trt.files import read_tensors
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape, Policy, resident_weight_bytes
from adatsq_trt.search.costs import time_model
from adatsq_trt.zoo.loading import load_model

MEASURED = Path(__file__).parents[2] / "benchmarks" / "kernels" / "results.json"
GPU, MS, BYTES, BITS = "rtx-5090", 0.00034, 112_500, 6.0


@pytest.fixture(scope="module")
def shapes() -> dict[str, LayerShape]:
    """With one row for each layer; bytes do not depend on it."""
    layers = load_model("digits-flux").adapter.quantizable_layers()
    return {name: LayerShape(name, m.in_features, m.out_features, 1) for name, m in layers.items()}


@pytest.fixture
def search(cli, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Search with some budgets; all in one run, so that calibration and weights are made once."""

    def run(*budgets: str) -> Policy:
        command = ("search", "digits-flux", "--target", "sm120", "--weights", "free", *cli.small)
        ended = cli(*command, *budgets, "--output", tmp_path / "run")
        assert ended.code == 0, ended.err
        return Policy.load(tmp_path / "run" / "search" / "policy.json")

    return run


def layers_ms(policy: Policy, run: Path, shapes: dict[str, LayerShape]) -> float:
    """What the roofline says of the layers alone."""
    rows = read_tensors(run / "calibrate" / "statistics.safetensors")["tokens"].tolist()
    model, _ = time_model(GPU)
    total = 0.0
    for step in range(policy.steps):
        for (name, fmt), count in zip(policy.formats_at(step).items(), rows, strict=True):
            shape = shapes[name]
            total += model.layer_ms(fmt, LayerShape(name, shape.in_features, shape.out_features, int(count)))
    return total


def test_each_budget_is_kept_and_the_policies_differ(search, tmp_path: Path, shapes: dict[str, LayerShape]) -> None:
    bits = search("--budget-bits", str(BITS))
    by_bytes = search("--budget-size", "112.5kB")
    by_ms = search("--budget-speed", f"{MS}ms", "--gpu", GPU)
    both = search("--budget-bits", str(BITS), "--budget-size", "112.5kB")
    assert bits.mean_bits <= BITS
    assert resident_weight_bytes(by_bytes, shapes) <= BYTES
    # Bytes alone: one weight of each layer, though it might have more.
    for column in zip(*by_bytes.assignments, strict=True):
        assert len({FORMATS[name].weight for name in column}) == 1
    assert layers_ms(by_ms, tmp_path / "run", shapes) <= MS
    assert both.mean_bits <= BITS
    assert resident_weight_bytes(both, shapes) <= BYTES
    # Bits alone may happen to keep the bytes too, and then nothing tells its policy from that of both.
    assert len({policy.model_dump_json() for policy in (bits, by_bytes, by_ms)}) > 1
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["budget_bits"], settings["budget_bytes"], settings["budget_ms"]) == (BITS, float(BYTES), None)


def test_speed_size_and_few_assignments_together(cli, search, tmp_path: Path, shapes: dict[str, LayerShape]) -> None:
    """Against 16 bits, with room for one assignment only: the policy of 16 bits is the yardstick of both."""
    few = search("--budget-size", "0.42x", "--budget-speed", "1.1x", "--budget-bits", "9", "--max-assignments", "1")
    assert len(few.assignments) == 1
    assert few.mean_bits <= 9
    sixteen = 2 * sum(shape.in_features * shape.out_features for shape in shapes.values())
    assert resident_weight_bytes(few, shapes) <= 0.42 * sixteen
    run = tmp_path / "run"
    result = json.loads((run / "search" / "result.json").read_text())
    (uniform,) = (p for p in result["points"] if p["kind"] == "uniform" and p["name"] == "bf16")
    chosen = result["points"][result["chosen"]]
    assert chosen["costs"]["ms"] <= uniform["costs"]["ms"] / 1.1
    assert uniform["costs"]["resident_bytes"] == sixteen
    assert result["limits"]["ms"] == pytest.approx(uniform["costs"]["ms"] / 1.1)
    # Milliseconds are of the layers, by the card's rates, and of what is not quantized.
    rest = uniform["costs"]["ms"] - layers_ms(everywhere(few, "bf16"), run, shapes)
    assert chosen["costs"]["ms"] == pytest.approx(layers_ms(few, run, shapes) + rest)
    assert rest > 0


def everywhere(policy: Policy, name: str) -> Policy:
    rows = [[name] * len(policy.layers)] * policy.steps
    return Policy.from_steps(policy.model, policy.weights_sha256, policy.layers, rows)


@pytest.mark.parametrize(
    ("options", "reference", "few", "source"),
    [
        (("--target", "sm120"), "nvfp4", 4, "RTX 5090"),
        (("--target", "sm89"), "fp8", 4, "RTX 4090"),
        (("--target", "sm80"), "int4wo", 4, "A100"),
        (("--target", "sm86"), "int4wo", 4, "A40"),
        (("--target", "sm90", "--layout", "plugin"), "w4a8", None, "H100"),
        (("--target", "cpu"), "w8a8s", 4, None),
    ],
)
def test_without_a_budget_a_policy_costs_little_more_than_the_targets_reference(
    cli, tmp_path: Path, options: tuple[str, ...], reference: str, few: int | None, source: str | None
) -> None:
    run = tmp_path / "run"
    ended = cli("search", "digits-flux", *options, *cli.small, "--steps", "1", "--output", run)
    assert ended.code == 0, ended.err
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["reference"], settings["max_assignments"], settings["budget_bits"]) == (reference, few, None)
    result = json.loads((run / "search" / "result.json").read_text())
    limits, time = result["limits"], "activation_bits" if source is None else "ms"
    costs = {p["name"]: p["costs"] for p in result["points"] if p["kind"] == "uniform"}
    room = limits["bytes"] / costs[reference]["resident_bytes"]
    assert room >= 1.1 - 1e-9
    assert limits[time] == pytest.approx(room * costs[reference][time])
    chosen = result["points"][result["chosen"]]
    assert chosen["costs"]["resident_bytes"] <= limits["bytes"] + 0.5
    assert chosen["costs"][time] <= limits[time] * (1 + 1e-9)
    assert "resident" in ended.out
    if source is None:
        assert result["ms_source"] is None
    else:
        assert source in result["ms_source"]


BUDGETS = {
    "bytes": (("--budget-size", "40kB"), "the smallest weights of these formats have 82944 bytes, 0.281x those"),
    "no size": (("--budget-size", "much"), "--budget-size 'much': expected a size such as 800000, 800kB, 12.5MB or"),
    "small part": (("--budget-size", "0.2x"), "the smallest weights of these formats have 82944 bytes, 0.281x those"),
    "no part": (("--budget-size", "0x"), "--budget-size '0x': got 0, expected a finite number above 0"),
    "no unit": (("--budget-speed", "12"), "--budget-speed '12': expected a speed against 16 bits such as 1.8x, or"),
    "unknown card": (("--budget-speed", "1ms", "--gpu", "rtx-509"), "unknown card 'rtx-509'; did you mean 'rtx-5090'?"),
    "no rate": (("--gpu", "a100"), "A100 80GB SXM has no rate for format 'nvfp4'; leave it out of"),
    "no time": (("--gpu", str(MEASURED)), "measured on NVIDIA H200 has no time for format 'nvfp4'"),
    "NaN": (("--budget-speed", "nanms"), "--budget-speed 'nanms': expected a speed against 16 bits such as 1.8x, or"),
    "bits beside bytes": (("--budget-bits", "3", "--budget-size", "1MB"), "cheapest is nvfp4 everywhere"),
    "bytes of old": (("--budget-bytes", "300kB"), "--budget-bytes is now --budget-size, which"),
    "ms of old": (("--budget-ms", "3"), "--budget-ms is now --budget-speed, which"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_that_cannot_be_kept_are_refused_before_anything_runs(cli, tmp_path: Path, name: str) -> None:
    options, message = BUDGETS[name]
    assert message in cli(*cli.build, *options, "--output", tmp_path / "run").refusal
    assert not (tmp_path / "run").exists()


def test_times_that_the_benchmark_measured_are_spent(cli, tmp_path: Path) -> None:
    run, formats = tmp_path / "run", "w4a8,fp8,w8a8,int4wo,bf16"
    options = ("--formats", formats, "--layout", "plugin", *cli.small, "--gpu", MEASURED)
    ended = cli("search", "digits-flux", *options, "--budget-speed", "3ms", "--output", run)
    assert ended.code == 0, ended.err
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["budget_ms"], settings["formats"]) == (3.0, formats.split(","))
    kept = cli.state(run / "search")
    ended = cli("search", "digits-flux", *options, "--budget-speed", "1e-6ms", "--output", run)
    assert "the fastest policy of these formats takes" in ended.refusal
    assert "(measured on NVIDIA H200)" in ended.refusal
    assert cli.state(run / "search") == kept


def test_milliseconds_that_no_policy_takes_are_refused_after_calibration(cli, tmp_path: Path) -> None:
    ended = cli(*cli.build, "--budget-speed", "1e-6ms", "--gpu", GPU, "--output", tmp_path / "run")
    assert "the fastest policy of these formats takes" in ended.refusal
    assert "(roofline of NVIDIA GeForce RTX 5090's published rates)" in ended.refusal
    assert (tmp_path / "run" / "calibrate").exists()
    assert not (tmp_path / "run" / "quantize").exists()


def test_every_card_of_the_roofline_knows_16_bits() -> None:
    from adatsq_trt.search.costs import CARDS

    assert all(FORMATS["bf16"].activation.element in card.tops for card in CARDS.values())

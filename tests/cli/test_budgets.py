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
GPU, MS, BYTES, BITS = "rtx-5090", 0.0009, 300_000, 6.0


@pytest.fixture(scope="module")
def shapes() -> dict[str, LayerShape]:
    """With one row for each layer; bytes do not depend on it."""
    layers = load_model("digits-flux").adapter.quantizable_layers()
    return {name: LayerShape(name, m.in_features, m.out_features, 1) for name, m in layers.items()}


@pytest.fixture
def search(cli, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Search with some budgets; all in one run, so that calibration and weights are made once."""

    def run(*budgets: str) -> Policy:
        ended = cli("search", "digits-flux", "--target", "sm120", *cli.small, *budgets, "--output", tmp_path / "run")
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
    by_bytes = search("--budget-bytes", "300kB")
    by_ms = search("--budget-ms", str(MS), "--gpu", GPU)
    both = search("--budget-bits", str(BITS), "--budget-bytes", "300kB")
    assert bits.mean_bits <= BITS
    assert resident_weight_bytes(by_bytes, shapes) <= BYTES
    # Bytes alone: one format of each layer; bits alone does not count what it stores.
    assert len(by_bytes.assignments) == 1
    assert resident_weight_bytes(bits, shapes) > BYTES
    assert layers_ms(by_ms, tmp_path / "run", shapes) <= MS
    assert both.mean_bits <= BITS
    assert resident_weight_bytes(both, shapes) <= BYTES
    policies = {policy.model_dump_json() for policy in (bits, by_bytes, by_ms, both)}
    assert len(policies) >= 3
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["budget_bits"], settings["budget_bytes"], settings["budget_ms"]) == (BITS, float(BYTES), None)


BUDGETS = {
    "bytes": (("--budget-bytes", "100kB"), "the smallest weights of these formats have 221184 bytes; raise the budget"),
    "no size": (("--budget-bytes", "much"), "--budget-bytes 'much': expected a size such as 800000, 800kB, 12.5MB"),
    "no card": (("--budget-ms", "1"), "--budget-ms 1: on which card? pass --gpu with one of a100, "),
    "unknown card": (("--budget-ms", "1", "--gpu", "rtx-509"), "unknown card 'rtx-509'; did you mean 'rtx-5090'?"),
    "card alone": (("--gpu", "a100"), "--gpu a100: it says where --budget-ms is spent; pass --budget-ms too"),
    "no rate": (("--budget-ms", "1", "--gpu", "a100"), "A100 80GB SXM has no rate for format 'nvfp4'; leave it out of"),
    "no time": (("--budget-ms", "1", "--gpu", str(MEASURED)), "measured on NVIDIA H200 has no time for format 'nvfp4'"),
    "NaN": (("--budget-ms", "nan", "--gpu", "a100"), "--budget-ms: got nan, expected a finite number"),
    "bits beside bytes": (("--budget-bits", "3", "--budget-bytes", "1MB"), "cheapest is nvfp4 everywhere"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_that_cannot_be_kept_are_refused_before_anything_runs(cli, tmp_path: Path, name: str) -> None:
    options, message = BUDGETS[name]
    assert message in cli(*cli.build, *options, "--output", tmp_path / "run").refusal
    assert not (tmp_path / "run").exists()


def test_times_that_the_benchmark_measured_are_spent(cli, tmp_path: Path) -> None:
    run, formats = tmp_path / "run", "w4a8,fp8,w8a8,int4wo,bf16"
    options = ("--formats", formats, "--layout", "plugin", *cli.small, "--gpu", MEASURED)
    ended = cli("search", "digits-flux", *options, "--budget-ms", "3", "--output", run)
    assert ended.code == 0, ended.err
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["budget_ms"], settings["formats"]) == (3.0, formats.split(","))
    kept = cli.state(run / "search")
    ended = cli("search", "digits-flux", *options, "--budget-ms", "1e-6", "--output", run)
    assert "the fastest policy of these formats takes" in ended.refusal
    assert "(measured on NVIDIA H200)" in ended.refusal
    assert cli.state(run / "search") == kept


def test_milliseconds_that_no_policy_takes_are_refused_after_calibration(cli, tmp_path: Path) -> None:
    ended = cli(*cli.build, "--budget-ms", "1e-6", "--gpu", GPU, "--output", tmp_path / "run")
    assert "the fastest policy of these formats takes" in ended.refusal
    assert "(roofline of NVIDIA GeForce RTX 5090's published rates)" in ended.refusal
    assert (tmp_path / "run" / "calibrate").exists()
    assert not (tmp_path / "run" / "quantize").exists()


def test_every_card_of_the_roofline_knows_16_bits() -> None:
    from adatsq_trt.search.costs import CARDS

    assert all(FORMATS["bf16"].activation.element in card.tops for card in CARDS.values())

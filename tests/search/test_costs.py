"""Milliseconds from published rates and from measured tables."""

import json
from pathlib import Path

import pytest

from adatsq_trt.errors import DamagedFileError, UnknownNameError, UnsupportedFormatError
from adatsq_trt.formats import FORMATS, PLUGIN_FORMATS, TARGETS
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import CARDS, TARGET_CARDS, stored_time_model, time_model
from adatsq_trt.timed_kernels import TIMED_KERNELS

MEASURED = Path(__file__).parents[2] / "benchmarks" / "kernels" / "results.json"
SMALL, LARGE = LayerShape("a", 3072, 3072, 16), LayerShape("b", 3072, 12288, 4608)


def test_few_rows_are_bound_by_memory_and_many_by_operations() -> None:
    model, text = time_model("rtx-5090")
    card = CARDS["rtx-5090"]
    small, large = (model.layer_ms(FORMATS["bf16"], shape) for shape in (SMALL, LARGE))
    moved = 2 * (3072 * 3072 + 2 * 16 * 3072)
    assert small == pytest.approx(moved / (card.memory_gbs * 1e9) * 1e3)
    assert large == pytest.approx(2 * 4608 * 3072 * 12288 / (209.5e12) * 1e3)
    assert model.layer_ms(FORMATS["nvfp4"], LARGE) < model.layer_ms(FORMATS["fp8"], LARGE) < large
    # Weight-only formats help only where memory decides.
    assert model.layer_ms(FORMATS["int4wo"], LARGE) == large
    assert model.layer_ms(FORMATS["int4wo"], SMALL) < small
    assert stored_time_model(text) == model
    assert model.source == "roofline of NVIDIA GeForce RTX 5090's published rates"
    assert model.rest_ms(209.5e9) == pytest.approx(1.0)


@pytest.mark.parametrize(("card", "name"), [("a100", "fp8"), ("rtx-4090", "nvfp4"), ("rtx-5090", "w4a4")])
def test_a_format_without_a_rate_is_refused(card: str, name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"has no rate for format '{name}'"):
        time_model(card)[0].layer_ms(FORMATS[name], SMALL)


def row(what: str, m: int, n: int, k: int) -> float:
    """Of the file that the benchmark wrote."""
    timings = json.loads(MEASURED.read_text())["timings"]
    (found,) = (t for t in timings if (t["what"], t["m"], t["n"], t["k"]) == (what, m, n, k))
    return float(found["median_ms"])


@pytest.mark.parametrize(
    ("name", "quantizer", "gemm"),
    [
        ("bf16", None, "torch.matmul bf16"),
        ("fp16", None, "torch.matmul bf16"),
        ("w8a8", "quantize_tokens natural", "gemm_w8a8"),  # not gemm_w8a8_nested, which begins alike
        ("w4a8", "quantize_tokens even-odd", "gemm_w4a8 64"),
        ("int4wo", None, "gemm_w4a16 64"),
        ("fp8", "quantize_tokens natural", "gemm_fp8"),  # that file is older than times of fp8's own quantizer
    ],
)
def test_a_file_that_the_benchmark_wrote_has_the_time_of_every_kernel(
    name: str, quantizer: str | None, gemm: str
) -> None:
    model, text = time_model(str(MEASURED))
    assert name in PLUGIN_FORMATS
    quantized = row(quantizer, 512, 3072, 3072) if quantizer else 0.0
    multiplied = row(gemm, 512, 3072, 3072)
    expected = pytest.approx(quantized + multiplied, rel=1e-12)
    assert model.layer_ms(FORMATS[name], LayerShape("a", 3072, 3072, 512)) == expected
    # Twice the outputs take twice the operations; the same inputs are quantized.
    twice = pytest.approx(quantized + 2 * multiplied, rel=1e-12)
    assert model.layer_ms(FORMATS[name], LayerShape("a", 3072, 6144, 512)) == twice
    assert model.source == "measured on NVIDIA H200"
    assert model.rest_ms(1e12) == 0
    assert stored_time_model(text) == model


def test_every_format_of_the_plugin_can_be_timed() -> None:
    time_model(str(MEASURED))[0].require([FORMATS[name] for name in sorted(PLUGIN_FORMATS)])
    assert set(TIMED_KERNELS) == PLUGIN_FORMATS


def test_a_format_that_was_not_timed_is_refused_with_those_that_were(tmp_path: Path) -> None:
    content = json.loads(MEASURED.read_text())
    content["timings"] = [t for t in content["timings"] if t["what"] in ("gemm_w8a8_nested", "torch.matmul bf16")]
    file = tmp_path / "times.json"
    file.write_text(json.dumps(content))
    for path, name, known in (
        (MEASURED, "nvfp4", "bf16, fp16, fp8, w8a8, w4a8, w8a16, int4wo"),
        (file, "w8a8", "bf16, fp16"),
    ):
        with pytest.raises(UnsupportedFormatError, match=f"no time for format '{name}', its formats are {known}; "):
            time_model(str(path))[0].require([FORMATS["bf16"], FORMATS[name]])


def test_tables_and_cards_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rtx-5090'"):
        time_model("rtx-509")
    unmeasured = tmp_path / "times.json"
    unmeasured.write_text('{"schema_version": 1, "measured": false, "reason": "no GPU"}')
    with pytest.raises(DamagedFileError, match="measured"):
        time_model(str(unmeasured))
    content = json.loads(MEASURED.read_text())
    again = content["timings"][0]
    content["timings"].append({**again, "median_ms": 2 * again["median_ms"]})
    unmeasured.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=f"two times of {again['what']} with m {again['m']}, n {again['n']}, "):
        time_model(str(unmeasured))


def test_every_gpu_has_a_card_that_knows_its_own_formats() -> None:
    assert set(TARGET_CARDS) == {name for name, target in TARGETS.items() if target.compute_capability is not None}
    for name, card in TARGET_CARDS.items():
        model, _ = time_model(card)
        assert model.knows([FORMATS[fmt] for fmt in TARGETS[name].formats]), name

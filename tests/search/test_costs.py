"""Milliseconds from published rates and from measured tables."""

import json
from pathlib import Path

import pytest

from adatsq_trt.errors import DamagedFileError, UnknownNameError, UnsupportedFormatError, UserError
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import CARDS, require_one_unit, stored_time_model, time_model

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


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """As `adatsq-trt benchmark kernels` writes it."""
    rows = [("torch.matmul bf16", 0.4), ("gemm_int8", 0.2), ("gemm_int4 128", 0.3), ("quantize_tokens natural", 0.01)]
    rows += [("quantize_tokens even-odd", 0.02), ("gemm_int4 64", 0.25)]
    timings = [
        {"what": what, "m": m, "n": 3072, "k": 3072, "median_ms": ms * m / 512, "p20_ms": 0, "of_bf16": 1}
        for what, ms in rows
        for m in (64, 512)
    ]
    file = tmp_path / "times.json"
    content = {"schema_version": 1, "measured": True, "card": "NVIDIA Test", "date": "2026-01-01", "timings": timings}
    file.write_text(json.dumps(content))
    return file


def test_measured_times_are_taken_from_the_nearest_shape(table: Path) -> None:
    model, text = time_model(str(table))
    near = LayerShape("a", 3072, 3072, 512)
    assert model.source == "measured on NVIDIA Test"
    assert model.layer_ms(FORMATS["bf16"], near) == pytest.approx(0.4)
    assert model.layer_ms(FORMATS["w8a8"], near) == pytest.approx(0.21)
    assert model.layer_ms(FORMATS["w4a8"], near) == pytest.approx(0.27)  # group 64, with its quantizer
    twice = LayerShape("a", 3072, 6144, 512)
    assert model.layer_ms(FORMATS["bf16"], twice) == pytest.approx(0.8)
    assert model.rest_ms(1e12) == 0
    assert stored_time_model(text) == model
    with pytest.raises(UnsupportedFormatError, match="has no time for format 'fp8'"):
        model.layer_ms(FORMATS["fp8"], near)


def test_tables_and_cards_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rtx-5090'"):
        time_model("rtx-509")
    unmeasured = tmp_path / "times.json"
    unmeasured.write_text('{"schema_version": 1, "measured": false, "reason": "no GPU"}')
    with pytest.raises(DamagedFileError, match="measured"):
        time_model(str(unmeasured))
    with pytest.raises(UserError, match="on which card"):
        require_one_unit(None, 3.0)
    with pytest.raises(UserError, match="pass --budget-ms too"):
        require_one_unit("a100", None)

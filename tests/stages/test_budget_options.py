"""From the budgets that were asked for, or not, to settings."""

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.formats import FORMATS, default_budget, resolve_formats, target_named
from adatsq_trt.policy import LayerShape
from adatsq_trt.stages.budget import sixteen_bit_bytes
from adatsq_trt.stages.budget_options import FEW, PLUGIN_REFERENCE, budget_settings, reference, size_settings

FP8 = [FORMATS["fp8"], FORMATS["bf16"]]
ADA = [target_named("sm89")]


def settings(targets=ADA, layout: str = "embedded", **choices: object) -> dict[str, object]:  # type: ignore[no-untyped-def]
    return budget_settings(BuildConfig(**choices), targets, layout, "fp8,bf16", FP8)


def test_without_a_budget_a_target_has_a_reference_and_a_study_its_bits() -> None:
    default = settings()
    assert (default["budget_bits"], default["reference"]) == (None, "fp8")
    study = settings([], simulate=True)
    assert study["budget_bits"] == default_budget("fp8,bf16")
    assert "reference" not in study


@pytest.mark.parametrize("choices", [{"budget_bits": 9.0}, {"policy": "policy.json"}])
def test_what_is_asked_for_replaces_the_reference(choices: dict[str, object]) -> None:
    asked = settings(**choices)
    assert "reference" not in asked
    assert asked["budget_bits"] == choices.get("budget_bits")


@pytest.mark.parametrize(
    ("layout", "choices", "most"),
    [
        ("embedded", {}, FEW),
        ("shared", {}, FEW),
        ("switch", {}, None),
        ("embedded", {"max_assignments": 9}, 9),
        ("embedded", {"simulate": True}, None),
        ("embedded", {"policy": "policy.json"}, None),
    ],
)
def test_assignments_are_few_where_each_is_an_engine(layout: str, choices: dict[str, object], most: int | None) -> None:
    assert settings(layout=layout, **choices)["max_assignments"] == most


def test_the_reference_is_the_first_target_s_own_or_the_cheapest() -> None:
    formats = resolve_formats("int4wo,fp8,bf16")
    assert reference([target_named("sm80"), *ADA], "embedded", formats) == "int4wo"
    assert reference(ADA, "embedded", formats) == "fp8"
    assert reference(ADA, "embedded", [FORMATS["bf16"]]) == "bf16"
    assert reference(ADA, "plugin", [FORMATS[PLUGIN_REFERENCE], *FP8]) == PLUGIN_REFERENCE


def test_a_size_beside_16_bits_is_of_the_model_s_layers() -> None:
    shapes = [LayerShape("a", 64, 32, 1), LayerShape("b", 32, 128, 1)]
    assert sixteen_bit_bytes(shapes) == 2 * (64 * 32 + 32 * 128)
    assert size_settings(BuildConfig(), shapes) == {}
    assert size_settings(BuildConfig(budget_size="3kB"), shapes) == {"budget_bytes": 3000.0}
    half = size_settings(BuildConfig(budget_size="0.5x"), shapes)
    assert half == {"budget_bytes": 64 * 32 + 32 * 128}


def test_a_speed_is_of_a_card() -> None:
    with pytest.raises(UserError, match=r"--budget-speed .*: on which card"):
        settings([], simulate=True, budget_speed="2ms")
    found = settings(budget_speed="2ms", gpu="rtx-4090")
    assert found["budget_ms"] == 2.0
    assert found["times"] is not None

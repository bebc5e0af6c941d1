"""The summary file."""

import json
from pathlib import Path

import pytest

from adatsq_trt.costs import Costs, Limits
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.report.data import ReportData
from adatsq_trt.report.summary import PolicyFigures, StageFigures, StaticErrors, Summary


def example() -> Summary:
    return Summary(
        settings_sha256="c" * 64,
        model="digits-flux",
        targets=("sm120",),
        formats=("nvfp4", "fp8", "bf16"),
        simulate=False,
        steps=20,
        guidance=2.0,
        limits=Limits(bits=6.0),
        policies=(
            PolicyFigures(
                name="chosen",
                kind="beam",
                assignments=3,
                mean_bits=5.98,
                costs=Costs(resident_bytes=300_000, activation_bits=6.2),
                resident_bits=6.4,
                error=0.1 + 0.2,
                standard_error=0.01,
                within_limits=True,
            ),
        ),
        buckets=4,
        assignments=3,
        mean_bits=5.98,
        mean_weight_bits=6.4,
        mean_activation_bits=6.2,
        final_error=0.1 + 0.2,
        final_standard_error=0.01,
        chosen_kind="beam",
        uniform_errors={"nvfp4": 0.5, "fp8": 0.01, "bf16": 1e-6},
        static_errors=StaticErrors(layer_only=0.4, time_only=None),
        held_out_samples=128,
        held_out_seeds=(1000, 1127),
        denoiser_calls=400,
        resident_weight_bytes=300_000,
        engines=3,
        onnx_bytes=1,
        weight_bytes=2,
        engine_bytes=3,
        stages={"search": StageFigures(seconds=1.5, peak_bytes=1 << 30)},
        versions={"torch": "2.13.0"},
    )


def test_a_summary_survives_the_disk(tmp_path: Path) -> None:
    write_json_model(tmp_path / "summary.json", example())
    assert read_json_model(tmp_path / "summary.json", Summary) == example()


def test_scripts_find_the_figures_by_name(tmp_path: Path) -> None:
    write_json_model(tmp_path / "summary.json", example())
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["schema_version"] == 3
    assert content["final_error"] == 0.1 + 0.2
    assert content["static_errors"] == {"layer_only": 0.4, "time_only": None}
    assert content["stages"]["search"] == {"seconds": 1.5, "peak_bytes": 1 << 30}


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("schema_version", 1, "schema version 1"), ("final_error", "small", "final_error")],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: object, complaint: str) -> None:
    content = json.loads(example().model_dump_json())
    (tmp_path / "summary.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(DamagedFileError, match=complaint):
        read_json_model(tmp_path / "summary.json", Summary)


def test_the_chosen_policy_is_told_beside_the_reference_format(data: ReportData) -> None:
    told = data.summary.beside_uniform
    assert told == "beside uniform nvfp4: 1.62 times the bytes, 1.62 times the time, 0.25 times the error"
    # A paired ratio is the uniform policy's error in the chosen one's, so the ends change places.
    policies = [
        policy.model_copy(update={"ratio": (4.0, 2.0, 5.0)}) if policy.name == "uniform nvfp4" else policy
        for policy in data.summary.policies
    ]
    paired = data.summary.model_copy(update={"policies": tuple(policies)})
    assert paired.beside_uniform.endswith("0.25 (0.20 to 0.50) times the error")
    of_fp8 = data.summary.model_copy(update={"reference": "fp8"}).beside_uniform
    assert of_fp8 == "beside uniform fp8: 0.81 times the bytes, 0.81 times the time, 2.00 times the error"


def test_without_a_uniform_policy_the_error_alone_is_told(data: ReportData) -> None:
    alone = data.summary.model_copy(update={"policies": data.summary.policies[:1]})
    assert alone.beside_uniform == "error: 1.00e-03 on 128 held-out samples"

"""`doctor` as a user meets it, with and without `--gpu`."""

import json
from pathlib import Path

import pytest
import tensorrt_rtx
import torch
import typer
from typer.testing import CliRunner

from adatsq_trt.cli.doctor import doctor
from adatsq_trt.engines.capabilities import diagnose


def test_command_prints_a_table_or_json() -> None:
    found = diagnose()
    app = typer.Typer()
    app.command()(doctor)
    table = CliRunner().invoke(app, [])
    assert table.exit_code == 0
    assert "TensorRT-RTX" in table.output
    for capability in found:
        assert capability.advice in table.output  # whole, whatever the width of the terminal
    listed = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert {row["name"] for row in listed} == {capability.name for capability in found}


# ----------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_gpu_without_a_gpu_says_what_it_would_do(cli, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    out = cli("doctor", "--gpu", "--output", file).out
    assert "driver: there is no NVIDIA driver" in out
    assert f"tensorrt_rtx: {tensorrt_rtx.__version__}" in out
    assert "digits-flux would be built for it, run, checked and timed" in out
    report = json.loads(file.read_text())
    assert report["machine"]["gpus"] == []
    assert report["trials"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_gpu_says_of_every_backend_why_it_does_not_run_a_bundle(cli, built: Path) -> None:
    report = json.loads(cli("doctor", "--gpu", "--bundle", built, "--json").out)
    assert list(report["backends"]) == ["rtx", "tensorrt", "cuda", "onnxruntime"]
    assert report["backends"]["onnxruntime"] is None
    assert all(report["backends"][name] for name in ("rtx", "tensorrt", "cuda"))
    out = cli("doctor", "--gpu", "--bundle", built).out
    assert "onnxruntime: runs here (auto takes this)" in out
    assert "on a GPU the bundle would be run, checked and timed" in out


def test_what_belongs_to_gpu_is_refused_without_it(cli, tmp_path: Path) -> None:
    assert "--bundle and --output belong to --gpu" in cli("doctor", "--output", tmp_path / "gpu.json").refusal

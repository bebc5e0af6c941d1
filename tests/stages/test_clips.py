"""Ratios that clip in stage `quantize`: what is stored for each format, and a search that was interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adatsq_trt.config import BuildConfig
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.models.format_store import SCALES_NAME
from adatsq_trt.progress import Reporter
from adatsq_trt.quantizers import static_activation_scale
from adatsq_trt.stages import clips
from adatsq_trt.stages.prepare import prepare

FORMATS = "w4a3g32,w4a4,w8a8s,nvfp4,w8a8"
ASKED: dict[str, Any] = {"simulate": True, "formats": FORMATS, "steps": 3, "calibration_samples": 2}


def quantized(folder: Path, **more: Any) -> Path:
    """Quantize digits-flux; the folder of the stage."""
    with prepare("digits-flux", BuildConfig(**ASKED, **more), "quantize").run(folder, Reporter()) as build:
        return build.run("quantize").folder


def test_an_interrupted_search_goes_on_and_ends_in_the_same_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_one(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_tensors", write_one)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "run")
    (first,) = written
    before = first.stat().st_ino
    scales = quantized(tmp_path / "run") / SCALES_NAME
    assert first.stat().st_ino == before
    assert scales.read_bytes() == (quantized(tmp_path / "undisturbed") / SCALES_NAME).read_bytes()

    found, whole = read_tensors(scales), read_tensors(quantized(tmp_path / "whole", clips="none") / SCALES_NAME)
    assert set(found) == set(whole) == {"w4a3g32", "w4a4", "w8a8s", "nvfp4"}
    statistics = read_tensors(tmp_path / "run" / "calibrate" / "statistics.safetensors")
    for name, table in whole.items():
        grid = format_named(name).activation
        exact = torch.ones_like(table) if grid.dynamic else static_activation_scale(statistics["largest"], grid)
        assert torch.equal(table, exact)
        assert (found[name] <= table).all()
        assert torch.equal(found[name], table) == (name in ("nvfp4", "w8a8s"))
    assert found["w4a4"].mean() < 1

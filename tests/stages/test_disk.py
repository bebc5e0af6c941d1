"""The estimate of a run's disk, beside what a run wrote."""

import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from adatsq_trt.formats import format_named
from adatsq_trt.stages import disk, export
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.memory import count_encodings
from tests.stages.tiny_run import given_policy

Usage = namedtuple("Usage", "total used free")


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_estimate_holds_what_a_run_wrote(finished: Context) -> None:
    needed = disk.disk_bytes(finished.settings, finished.adapter)
    assert list(needed) == ["calibrate", "quantize", "search", "export", "bundle"]
    folders = [finished.run.path / "quantize" / name for name in finished.settings.formats]
    grids = {format_named(name).weight for name in finished.settings.formats}
    assert sum(folder.is_dir() for folder in folders) == len(grids)
    assert needed["quantize"] == pytest.approx(sum(map(written, folders)), rel=0.05)  # files have headers
    # Sums of gradients are gone at the end; without them the two sets of Hessians are left.
    calibrate = finished.run.path / "calibrate"
    hessians = written(calibrate / "hessians") + written(calibrate / "unweighted_hessians")
    assert 0.95 * hessians < needed["calibrate"] < 3 * hessians
    stored = (finished.run.path / "export" / export.PROMPTS).stat().st_size
    assert 4 * count_encodings(finished.adapter) == pytest.approx(stored, rel=0.2)  # files have headers
    assert needed["export"] > stored
    given = finished.settings.model_copy(update={"policy": given_policy().model_dump_json()})
    assert disk.disk_bytes(given, finished.adapter)["search"] == 0 < needed["search"]


def test_graphs_hold_full_precision_beside_candidates_and_plans_of_embedded_bundles(finished: Context) -> None:
    settings, adapter = finished.settings, finished.adapter
    linears = adapter.quantizable_layers().values()
    weights = sum(linear.weight.numel() for linear in linears)

    def exported(**changes: object) -> dict[str, int]:
        return disk.disk_bytes(
            settings.model_copy(update={"simulate": False, "targets": ("sm120",), **changes}), adapter
        )

    narrow = exported(formats=("w4a8", "w8a8"), layout="shared", max_assignments=None)
    wide = exported(formats=("w4a8", "w8a8", "bf16"), layout="shared", max_assignments=None)
    assert narrow["export"] == wide["export"] > 2 * weights
    assert narrow["bundle"] == narrow["export"]
    embedded = exported(formats=("w4a8", "w8a8"), layout="embedded", max_assignments=2)
    assert embedded["bundle"] - embedded["export"] > 2 * weights  # two plans with up to a byte for each weight


def test_a_disk_with_too_little_room_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "there").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 10**10, 4_000))
    with caplog.at_level(logging.WARNING):
        disk.warn_when_full(5_000, tmp_path / "run")  # what is there counts
        disk.warn_when_full(4_000, tmp_path / "not" / "made" / "yet")
        assert not caplog.messages
        disk.warn_when_full(5_001, tmp_path / "run")
    assert "pass --output on a larger one" in caplog.text

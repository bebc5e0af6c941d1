"""The GPU script as far as a CPU carries it: its refusal, and its comparisons in the interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError, OutputError
from adatsq_trt.plugins import benchmark
from adatsq_trt.plugins.kernels import cases, quantize
from adatsq_trt.plugins.tiles import Tile, dump_tiles, load_tiles, tile_for

ROOT = Path(__file__).parents[3]
TILES = {place: (Tile(16, 16, place.group or 32, 2, 4, 2),) for place in benchmark.places("sm90")}
SHAPES = ((17, 20, 128),)

# Runs the script where nothing but torch, the Triton language and what these need can be imported.
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("pydantic", "typer", "rich", "diffusers", "onnx", "safetensors")))
sys.argv = ["run.py", "--output", sys.argv[1]]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_every_kernel_is_compared() -> None:
    comparisons = len(TILES) * len(SHAPES) * 2 + 2 * 2 + 2
    assert benchmark.check(TILES, "sm90", "cpu", SHAPES) == comparisons
    assert {place.kernel for place in TILES} == set(cases.GEMMS)
    assert "gemm_fp8" not in {place.kernel for place in benchmark.places("sm80")}


def test_a_wrong_kernel_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(codes: torch.Tensor) -> torch.Tensor:
        return codes.roll(1, dims=1)

    monkeypatch.setattr(quantize, "even_odd", wrong)
    with pytest.raises(AdatsqError, match="nothing was timed: gemm_w8a8_nested group 0"):
        benchmark.check(TILES, "sm90", "cpu", SHAPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU"):
        benchmark.benchmark(tmp_path / "results.json")
    code = ALONE.format(script=str(ROOT / "benchmarks" / "kernels" / "run.py"))
    command = [sys.executable, "-c", code, str(tmp_path / "results.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "needs an NVIDIA GPU" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if there were a GPU; what was done on it."""
    done: list[str] = []
    monkeypatch.setattr(benchmark, "require_gpu", lambda: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(benchmark, "check", lambda *_: done.append("check") or 3)
    monkeypatch.setattr(benchmark, "measure", lambda *_: done.append("measure") or [])
    return done


def test_results_are_written_whole(measured: list[str], tmp_path: Path) -> None:
    benchmark.benchmark(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["card"] == "a card"
    assert (measured, len(list(tmp_path.iterdir()))) == (["check", "measure"], 1)


@pytest.mark.parametrize("name", [".", "missing/results.json"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    measured: list[str], tmp_path: Path, name: str
) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        benchmark.benchmark(tmp_path / name)
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_a_tile_of_this_card(measured: list[str], tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(dump_tiles({}, "empty"))
    with pytest.raises(DamagedFileError, match="has none for gemm_w8a8 with group 0 on sm90"):
        benchmark.benchmark(tmp_path / "results.json", tmp_path / "tuning.json")
    assert measured == []


@pytest.mark.gpu
def test_kernels_on_this_gpu() -> None:
    assert benchmark.check(load_tiles(), benchmark.require_gpu()) > 0


def test_tile_is_the_lowest_that_holds_all_tokens() -> None:
    tiles = tuple(Tile(height, 64, 64, 8, 4, 3) for height in (16, 64, 128))
    assert [tile_for(tiles, m).block_m for m in (1, 16, 17, 64, 65, 5000)] == [16, 16, 64, 64, 128, 128]

"""The GPU script as far as a CPU carries it: its refusal, and its comparisons in the interpreter."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

import adatsq_trt
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError, OutputError
from adatsq_trt.formats import FORMATS, PLUGIN_FORMATS
from adatsq_trt.plugins import benchmark
from adatsq_trt.plugins.kernels import cases, quantize
from adatsq_trt.plugins.tiles import Tile, dump_tiles, load_tiles, tile_for
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import time_model

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


def run_once(run: Callable[[], object], quantiles: Sequence[float] = (), **_: str) -> float | list[float]:
    """In the place of the GPU's clock: one run, and a time that rises with each."""
    run()
    run_once.runs += 1  # type: ignore[attr-defined]
    median = float(run_once.runs)  # type: ignore[attr-defined]
    return [median, median - 0.5, median + 0.5] if quantiles else median


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script on the CPU: the kernels run in the interpreter, on small shapes, beside a clock that lies."""
    monkeypatch.setattr(run_once, "runs", 0, raising=False)
    monkeypatch.setattr(benchmark, "do_bench", run_once)
    monkeypatch.setattr(benchmark, "require_gpu", lambda: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no card")
    monkeypatch.setattr(benchmark, "check", partial(benchmark.check, device="cpu", shapes=SHAPES))
    timed = partial(benchmark.measure, device="cpu", shapes=((16, 32, 128), (17, 32, 128)), largest=8)
    monkeypatch.setattr(benchmark, "measure", timed)


@pytest.mark.usefixtures("without_gpu")
def test_the_script_checks_and_times_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuning.json").write_text(dump_tiles(TILES, "for the interpreter"))
    files = ["--output", str(tmp_path / "results.json"), "--tuning", str(tmp_path / "tuning.json")]
    monkeypatch.setattr(sys, "argv", ["run.py", *files])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(adatsq_trt, "__path__", [*adatsq_trt.__path__])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "kernels" / "run.py"), run_name="__main__")
    assert ended.value.code == 0
    timings = json.loads((tmp_path / "results.json").read_text())["timings"]
    kernels = {f"{place.kernel} {place.group or ''}".strip() for place in TILES}
    quantizers = {"quantize_tokens natural", "quantize_tokens even-odd", "quantize_fp8"}
    torchs = {"torch.matmul bf16", "torch._int_mm", "torch._scaled_mm"}
    for m in (16, 17):
        rows = [row for row in timings if row["m"] == m]
        refused = {"torch._int_mm"} if m == 16 else set()
        assert {row["what"] for row in rows} == kernels | quantizers | torchs - refused
        bf16, *others = rows
        assert (bf16["what"], bf16["of_bf16"]) == ("torch.matmul bf16", 1)
        for row in others:
            assert row["of_bf16"] == bf16["median_ms"] / row["median_ms"]
            assert row["of_ceiling"] == m * 32 * 128 / row["median_ms"] / 8**3
            assert row["p20_ms"] < row["median_ms"] < row["p80_ms"]


@pytest.mark.usefixtures("without_gpu")
def test_the_search_prices_every_format_of_the_plugin_from_what_the_benchmark_writes(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(dump_tiles(TILES, "for the interpreter"))
    file = tmp_path / "results.json"
    benchmark.benchmark(file, tmp_path / "tuning.json")
    model, _ = time_model(str(file))
    written = {row["what"]: row["median_ms"] for row in json.loads(file.read_text())["timings"] if row["m"] == 17}
    expected = {
        "bf16": written["torch.matmul bf16"],
        "fp16": written["torch.matmul bf16"],
        "fp8": written["quantize_fp8"] + written["gemm_fp8"],
        "w8a8": written["quantize_tokens natural"] + written["gemm_w8a8"],
        "w4a8": written["quantize_tokens even-odd"] + written["gemm_w4a8 64"],
        "int4wo": written["gemm_w4a16 64"],
        "w8a16": written["gemm_w8a16"],
    }
    assert expected.keys() == PLUGIN_FORMATS
    shape = LayerShape("layer", 128, 32, 17)
    assert {name: model.layer_ms(FORMATS[name], shape) for name in expected} == expected


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

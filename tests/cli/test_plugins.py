"""`build plugins` and `benchmark kernels` as a user meets them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from adatsq_trt.plugins import build
from adatsq_trt.plugins.aot import CompiledVariant, KernelTable

ENTRY = CompiledVariant(
    **{"kernel": "gemm_w4a8", "target": "sm90", "dtype": "bf16", "group": 64, "order": "even_odd"},
    **{"block_m": 16, "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3},
    **{"shared_bytes": 10240, "registers": 48, "spill_bytes": 0, "symbol": "gemm_w4a8", "file": "some.cubin"},
    **{"sha256": "", "parameters": (), "divisible_by_16": ()},
)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles at once."""
    monkeypatch.setattr(build, "compile_kernels", lambda *_: KernelTable(kernels=(ENTRY,)))


@pytest.mark.usefixtures("compiler")
def test_build_reports_registers_and_what_was_left_out(cli, tmp_path: Path) -> None:
    arguments = ("build", "plugins", "--targets", "sm90", "-o", tmp_path / "out", "--tensorrt-root", tmp_path)
    ended = cli(*arguments)
    assert ended.code == 0
    assert ["some.cubin", "4", "48", "10.0", "KiB", "0", "B"] in [line.split() for line in ended.out.splitlines()]
    assert "the library was left out" in ended.out
    assert '"registers": 48' in cli(*arguments, "--json").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "sm90,sm91"), "unknown target 'sm91'; did you mean 'sm90'?"),
        (("--tuning", "nowhere.json"), "'nowhere.json' does not exist"),
    ],
)
def test_impossible_builds_write_nothing(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in cli("build", "plugins", "-o", "out", *arguments).refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("build", "plugins"), ("benchmark", "kernels")], ids=" ".join)
def test_the_triton_language_is_asked_for(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "pip install 'adatsq-trt[plugins]'" in cli(*command, "-o", tmp_path / "out").refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("tune", [(), ("--tune",)], ids=["measure", "tune"])
def test_benchmark_without_a_gpu_is_one_sentence(cli, tmp_path: Path, tune: tuple[str, ...]) -> None:
    assert "needs an NVIDIA GPU" in cli("benchmark", "kernels", "-o", tmp_path / "out.json", *tune).refusal
    assert list(tmp_path.iterdir()) == []

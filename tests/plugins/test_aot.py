"""Ahead-of-time compilation with the real compiler and assembler; no GPU."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from adatsq_trt.errors import AdatsqError
from adatsq_trt.files import read_json_model
from adatsq_trt.plugins.aot import TABLE_NAME, KernelTable, Variant, compile_kernels, variants
from adatsq_trt.plugins.catalog import EVEN_ODD, NATURAL, TARGETS
from adatsq_trt.plugins.tiles import Place, Tile, load_tiles

FEW = Tile(16, 64, 64, 8, 4, 3)
QUANTIZE = Variant(Place("quantize_tokens", "sm89", 0), "fp16", EVEN_ODD, Tile(1, 1, 1024, 1, 4, 1))
W4A8 = Variant(Place("gemm_w4a8", "sm80", 64), "bf16", EVEN_ODD, FEW)
FP8 = Variant(Place("gemm_fp8", "sm90", 0), "fp16", NATURAL, replace(FEW, block_k=128))
WANTED = (QUANTIZE, W4A8, FP8)
SCRATCH = ("global_scratch", "profile_scratch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "old.cubin").touch()
    compile_kernels(WANTED, folder, 1)
    return folder


def test_table_describes_the_cubins_beside_it(folder: Path) -> None:
    table = read_json_model(folder / TABLE_NAME, KernelTable)
    assert {entry.file for entry in table.kernels} == {path.name for path in folder.glob("*.cubin")}
    for entry, variant in zip(table.kernels, WANTED, strict=True):
        cubin = (folder / entry.file).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert entry.symbol.encode() in cubin
        assert hashlib.sha256(cubin).hexdigest() == entry.sha256
        assert Place(entry.kernel, entry.target, entry.group) == variant.place
        assert Tile(**{name: getattr(entry, name) for name in vars(variant.tile)}) == variant.tile
        assert (entry.dtype, entry.order) == (variant.dtype, variant.order)
        assert (entry.spill_bytes, 16 <= entry.registers <= 255) == (0, True)
        assert str(folder).encode() not in cubin


def test_launch_parameters(folder: Path) -> None:
    quantize, w4a8, fp8 = read_json_model(folder / TABLE_NAME, KernelTable).kernels
    assert [(p.name, p.type) for p in quantize.parameters if p.type != "pointer"] == [
        ("k", "int32"),
        ("maximum", "float32"),
        ("has_smooth", "int32"),
    ]
    names = ("x", "x_scale", "w", "w_scale", "bias", "y", "m", "n", "k", "has_bias", *SCRATCH)
    assert tuple(p.name for p in w4a8.parameters) == names == tuple(p.name for p in fp8.parameters)
    assert set(names) - set(w4a8.divisible_by_16) == {"m", "has_bias", *SCRATCH}


def test_unsound_kernels_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    spilling = replace(W4A8, tile=Tile(64, 128, 64, 8, 1, 2))
    crowded = Variant(Place("gemm_16", "sm86", 0), "fp16", NATURAL, Tile(64, 64, 128, 8, 4, 6))
    with pytest.raises(AdatsqError) as refusal:
        compile_kernels([spilling, crowded], tmp_path / "kernels", 1)
    assert re.search(r"gemm_w4a8_g64_bf16_64x128x64_sm80.cubin spills \d+ bytes", str(refusal.value))
    assert re.search(r"gemm_16_fp16_64x64x128_sm86.cubin needs \d+ bytes of shared memory", str(refusal.value))
    assert not (tmp_path / "kernels").exists()


@pytest.mark.slow
def test_what_the_compiler_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AdatsqError, match=r"the Triton language cannot compile gemm_w4a8[^\n]*$"):
        compile_kernels([replace(W4A8, tile=replace(FEW, block_k=16))], tmp_path / "kernels", 1)
    assert not (tmp_path / "kernels").exists()


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    compile_kernels([W4A8], tmp_path, 1)
    name = f"{W4A8.name}.cubin"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_everything_that_ships_compiles_without_spills(tmp_path: Path) -> None:
    wanted = list(variants(TARGETS, load_tiles()))
    assert len(compile_kernels(wanted, tmp_path, 2).kernels) == len(wanted)

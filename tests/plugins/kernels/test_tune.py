"""The search for tiles, with a compiler and a clock that answer at once, and kernels in the interpreter."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial

import pytest
from torch import Tensor

from adatsq_trt.errors import AdatsqError, DependencyError
from adatsq_trt.plugins import benchmark, tune
from adatsq_trt.plugins.aot import CompiledVariant, Variant
from adatsq_trt.plugins.kernels import quantize
from adatsq_trt.plugins.tiles import Place, Tile

PLACE = Place("gemm_w4a8", "sm90", 64)


class Compiler(Executor):
    """Compiles what is narrow, lets the rest spill, and refuses four stages."""

    def __init__(self, widest: int) -> None:
        self.widest = widest

    def submit(self, _function: Callable[..., object], variant: Variant) -> Future[tuple[CompiledVariant, bytes]]:
        future: Future[tuple[CompiledVariant, bytes]] = Future()
        spills = 8 if variant.tile.block_n > self.widest else 0
        if variant.tile.num_stages == 4:
            future.set_exception(AdatsqError("refused"))
        else:
            known = {"target": "sm90", "spill_bytes": spills, "shared_bytes": 0, "file": variant.name}
            future.set_result((CompiledVariant.model_construct(**known), b""))
        return future


def test_candidates_keep_their_sums_in_registers() -> None:
    for place in (PLACE, Place("gemm_16", "sm90", 0)):
        for band in tune.BANDS:
            tiles = list(tune.candidates(place, band))
            assert len(set(tiles)) == len(tiles) > 5
            assert {tile.block_m for tile in tiles} == set(band.heights)
            assert all(tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps for tile in tiles)
            assert all(tile.block_k == place.group for tile in tiles if place.group)


def test_the_fastest_sound_finalist_wins() -> None:
    tiles = [Tile(16, n, 64, 8, warps, 3) for n in (64, 128, 256) for warps in (4, 8)]

    def quick(tile: Tile) -> float:
        return 1 / tile.block_n + 0.001 * tile.num_warps

    def thorough(tile: Tile) -> float:
        assert quick(tile) <= sorted(map(quick, tiles))[3], "only finalists are timed on every shape"
        return tile.block_n

    best = tune.fastest(tiles, quick, thorough, lambda _tile: True)
    assert best is not None
    assert best.block_n == 128
    best = tune.fastest(tiles, quick, thorough, lambda tile: tile.block_n == 64)
    assert best == Tile(16, 64, 64, 8, 4, 3)
    assert tune.fastest(tiles, quick, thorough, lambda _tile: False) is None


def test_a_tile_that_spills_or_that_the_compiler_refuses_is_unsound() -> None:
    compiler = Compiler(widest=128)
    assert tune.is_sound(compiler, PLACE, Tile(16, 128, 64, 8, 4, 3))
    assert not tune.is_sound(compiler, PLACE, Tile(16, 256, 64, 8, 4, 3))
    assert not tune.is_sound(compiler, PLACE, Tile(16, 128, 64, 8, 4, 4))


def test_a_tile_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with a kernel that reads its weights in the wrong order."""
    tile = Tile(16, 16, 64, 2, 4, 2)
    on_cpu = partial(benchmark.wrong_tiles, device="cpu", shapes=((17, 20, 128),))
    monkeypatch.setattr(tune, "wrong_tiles", on_cpu)
    assert tune.is_right(PLACE, tile)
    monkeypatch.setattr(quantize, "even_odd", lambda codes: codes.roll(1, dims=1))
    assert not tune.is_right(PLACE, tile)


def test_a_tile_is_timed_on_every_layer_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that lies, after it has run the kernel in the interpreter."""
    shapes: list[tuple[int, ...]] = []

    def clock(run: Callable[[], Tensor], return_mode: str, **_: int) -> float:
        assert return_mode == "median"
        y = run()
        assert y.isfinite().all()
        shapes.append(tuple(y.shape))
        return 10.0 if len(shapes) % 2 else 1000.0

    monkeypatch.setattr(tune, "do_bench", clock)
    monkeypatch.setattr(tune, "LAYERS", ((32, 64), (48, 128)))
    cases = tune.make_cases(PLACE, tune.Band((16,), (16, 20)), "cpu")
    took = tune.milliseconds(cases, {}, Tile(16, 16, 64, 2, 4, 2))
    assert shapes == [(20, 48), (20, 32), (16, 48), (16, 32)]
    assert took == pytest.approx(100)  # the geometric mean


def test_a_tile_that_cannot_be_launched_is_no_candidate() -> None:
    assert tune.runs(PLACE, Tile(16, 16, 64, 2, 4, 2), "cpu")
    assert not tune.runs(PLACE, Tile(16, 24, 64, 2, 4, 2), "cpu")  # the language has powers of two only


def test_tuning_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU"):
        tune.tune(1)

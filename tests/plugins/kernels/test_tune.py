"""The search for tiles, with a compiler and a clock that answer at once."""

from collections.abc import Callable
from concurrent.futures import Executor, Future

import pytest
from torch import Tensor

from adatsq_trt.errors import AdatsqError, DependencyError
from adatsq_trt.plugins import tune
from adatsq_trt.plugins.aot import CompiledVariant, Variant
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


def test_the_fastest_that_compiles_without_spills_wins() -> None:
    def wide_is_fast(_place: Place, tile: Tile, _band: tune.Band) -> float:
        return 1 / tile.block_n + 0.01 * tile.num_warps

    best = tune.fastest(PLACE, tune.BANDS[0], Compiler(widest=128), wide_is_fast)
    assert (best.block_n, best.num_warps, best.num_stages) == (128, 4, 3)


def test_a_tile_is_timed_on_every_layer_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that gives the number of products, after it has run the kernel in the interpreter."""
    shapes: list[tuple[int, ...]] = []

    def clock(run: Callable[[], Tensor], return_mode: str) -> float:
        assert return_mode == "median"
        y = run()
        assert y.isfinite().all()
        shapes.append(tuple(y.shape))
        return 10.0 if len(shapes) % 2 else 1000.0

    monkeypatch.setattr(tune, "do_bench", clock)
    monkeypatch.setattr(tune, "LAYERS", ((32, 64), (48, 128)))
    took = tune.milliseconds(PLACE, Tile(16, 16, 64, 2, 4, 2), tune.Band((16,), (16, 20)), "cpu")
    assert shapes == [(16, 32), (16, 48), (20, 32), (20, 48)]
    assert took == pytest.approx(100)  # the geometric mean


def test_nothing_that_fits_is_said() -> None:
    with pytest.raises(AdatsqError, match="no tile of gemm_w4a8 with heights"):
        tune.fastest(PLACE, tune.BANDS[0], Compiler(widest=0), lambda *_: 1.0)


def test_tuning_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU"):
        tune.tune(1)

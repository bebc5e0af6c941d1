"""The fastest tiles on this machine's GPU, among those that compile without spills."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from triton.testing import do_bench

from adatsq_trt.errors import AdatsqError
from adatsq_trt.plugins.aot import CompiledVariant, Variant, compile_variant, compiler_pool, faults
from adatsq_trt.plugins.benchmark import LAYERS, places, require_gpu
from adatsq_trt.plugins.catalog import DTYPES, KERNELS
from adatsq_trt.plugins.kernels.cases import GEMMS, Problem
from adatsq_trt.plugins.tiles import Place, Tile, Tiles


@dataclass(frozen=True)
class Band:
    """Tiles that compete with each other.

    Attributes:
        heights: block_m of the tiles.
        tokens: M of the multiplications that decide.
    """

    heights: tuple[int, ...]
    tokens: tuple[int, ...]


BANDS = (Band((16,), (16,)), Band((32, 64), (64,)), Band((128, 256), (1024, 4608)))
_MAX_SUMS = 128  # of one thread; more cannot stay in its 255 registers


def candidates(place: Place, band: Band) -> Iterator[Tile]:
    """Tiles worth compiling."""
    inner = (place.group,) if place.group else (64, 128)
    for m, n, k, warps, stages in itertools.product(band.heights, (64, 128, 256), inner, (4, 8), (3, 4)):
        if m * n <= _MAX_SUMS * 32 * warps:
            yield Tile(m, n, k, 8, warps, stages)


def fastest(place: Place, band: Band, pool: Executor, time: Callable[[Place, Tile, Band], float]) -> Tile:
    """The best tile of a band.

    Args:
        place: the kernel.
        band: which tiles compete.
        pool: compiles them.
        time: measures one.

    Raises:
        AdatsqError: none compiles without spills.
    """
    order = KERNELS[place.kernel].orders[0]
    waiting = {
        tile: [pool.submit(compile_variant, Variant(place, dtype, order, tile)) for dtype in DTYPES]
        for tile in candidates(place, band)
    }
    sound = [tile for tile, compiled in waiting.items() if _sound(compiled)]
    if not sound:
        raise AdatsqError(f"no tile of {place.kernel} with heights {band.heights} fits {place.target} without spills")
    return min(sound, key=lambda tile: time(place, tile, band))


def _sound(compiled: Iterable[Future[tuple[CompiledVariant, bytes]]]) -> bool:
    try:
        return not any(faults(each.result()[0]) for each in compiled)
    except AdatsqError:  # the compiler refuses it
        return False


def milliseconds(place: Place, tile: Tile, band: Band, device: str = "cuda") -> float:
    """Geometric mean over the band's tokens and the layers."""
    import torch

    logarithms = []
    for m, (n, k) in itertools.product(band.tokens, LAYERS):
        case = GEMMS[place.kernel](Problem(m, n, k, torch.bfloat16, device=device), place.group)
        logarithms.append(math.log(do_bench(lambda case=case: case.launch(tile), return_mode="median")))
    return math.exp(sum(logarithms) / len(logarithms))


def tune(jobs: int, start: Callable[[int], Callable[[], None]] = lambda _total: lambda: None) -> Tiles:
    """Find the tiles of every GEMM on this card.

    Args:
        jobs: compilers at a time.
        start: called with the number of searches; gives the function that is called after each.

    Raises:
        DependencyError: there is no suitable GPU.
        AdatsqError: nothing fits.
    """
    searches = [(place, band) for place in places(require_gpu()) for band in BANDS]
    advance = start(len(searches))
    found: dict[Place, tuple[Tile, ...]] = {}
    with compiler_pool(jobs) as pool:
        for place, band in searches:
            found[place] = (*found.get(place, ()), fastest(place, band, pool, milliseconds))
            advance()
    return found

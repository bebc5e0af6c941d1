"""The fastest tiles on this machine's GPU, among those that compile without spills."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from triton.testing import do_bench

from adatsq_trt.errors import AdatsqError
from adatsq_trt.plugins.aot import Variant, compile_variant, compiler_pool, faults
from adatsq_trt.plugins.benchmark import LAYERS, places, require_gpu, wrong_tiles
from adatsq_trt.plugins.catalog import DTYPES, KERNELS
from adatsq_trt.plugins.kernels.cases import GEMMS, Case, Problem
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


# The lowest tile that holds all tokens is launched (`tile_for`), so a band is no lower than the tokens that it is for.
BANDS = (Band((16,), (16,)), Band((64,), (64,)), Band((128, 256), (1024, 4608)))
_MAX_SUMS = 128  # of one thread; more cannot stay in its 255 registers
_FINALISTS = 4  # tiles that are timed on every shape, after one shape has ranked all
_QUICK = {"warmup": 5, "rep": 20}  # milliseconds
_THOROUGH = {"warmup": 10, "rep": 50}


def candidates(place: Place, band: Band) -> Iterator[Tile]:
    """Tiles worth compiling."""
    inner = (place.group,) if place.group else (64, 128)
    for m, n, k, warps, stages in itertools.product(band.heights, (64, 128, 256), inner, (4, 8), (3, 4)):
        if m * n <= _MAX_SUMS * 32 * warps:
            yield Tile(m, n, k, 8, warps, stages)


def fastest(
    tiles: Iterable[Tile],
    quick: Callable[[Tile], float],
    thorough: Callable[[Tile], float],
    sound: Callable[[Tile], bool],
) -> Tile | None:
    """The best of a band: one shape ranks all tiles, all shapes rank the shortlist, and a sound one wins.

    Args:
        tiles: tiles that compete.
        quick: time on one shape.
        thorough: time on all shapes.
        sound: whether it is right, and the ahead-of-time compiler takes it without spills.
    """
    ranked = sorted(tiles, key=quick)
    finalists = sorted(ranked[:_FINALISTS], key=thorough)
    return next(filter(sound, [*finalists, *ranked[_FINALISTS:]]), None)


def is_sound(pool: Executor, place: Place, tile: Tile) -> bool:
    """Whether the ahead-of-time compiler makes a tile's cubins without spills, in shared memory that the GPU has.

    Args:
        pool: processes that compile.
        place: the kernel.
        tile: how it is cut.
    """
    order = KERNELS[place.kernel].orders[0]
    compiled = [pool.submit(compile_variant, Variant(place, dtype, order, tile)) for dtype in DTYPES]
    try:
        return not any(faults(each.result()[0]) for each in compiled)
    except AdatsqError:  # the compiler refuses it
        return False


def is_right(place: Place, tile: Tile) -> bool:
    """Whether a tile gives the reference's numbers; compilers have made fast code that does not."""
    wrong, _ = wrong_tiles(place, (tile,))
    return not wrong


def runs(place: Place, tile: Tile, device: str = "cuda") -> bool:
    """Launch a tile once on a small problem; in another process this fills the cache that a timed launch reads."""
    try:
        GEMMS[place.kernel](Problem(16, 256, 256, torch.bfloat16, device=device), place.group).launch(tile)
    except Exception:  # of the compiler, the assembler or the launch: this tile is none for this GPU
        return False
    return True


def make_cases(place: Place, band: Band, device: str = "cuda") -> list[Case]:
    """The multiplications that decide; the first ranks all tiles."""
    shapes = itertools.product(sorted(band.tokens, reverse=True), LAYERS[1:] + LAYERS[:1])
    return [GEMMS[place.kernel](Problem(m, n, k, torch.bfloat16, device=device), place.group) for m, (n, k) in shapes]


def milliseconds(cases: Sequence[Case], durations: dict[str, int], tile: Tile) -> float:
    """Geometric mean of the medians over some cases."""
    medians = [do_bench(partial(case.launch, tile), return_mode="median", **durations) for case in cases]
    return math.exp(sum(map(math.log, medians)) / len(medians))


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
    with compiler_pool(jobs) as compilers, _launchers(jobs) as launchers:
        waiting = [
            [(tile, launchers.submit(runs, place, tile)) for tile in candidates(place, band)]
            for place, band in searches
        ]
        for (place, band), tried in zip(searches, waiting, strict=True):
            tiles = [tile for tile, launched in tried if launched.result()]
            cases = make_cases(place, band)
            quick, thorough = partial(milliseconds, cases[:1], _QUICK), partial(milliseconds, cases, _THOROUGH)

            def sound(tile: Tile, place: Place = place) -> bool:
                return is_right(place, tile) and is_sound(compilers, place, tile)

            best = fastest(tiles, quick, thorough, sound)
            if best is None:
                raise AdatsqError(
                    f"no tile of {place.kernel} with heights {band.heights} is right on {place.target} without spills"
                )
            found[place] = (*found.get(place, ()), best)
            advance()
    return found


@contextlib.contextmanager
def _launchers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `runs`; they share this one's cache of compiled kernels."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

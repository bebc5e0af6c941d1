"""The kernels on a GPU: are they right, and how fast are they beside PyTorch's?

Needs nothing but torch and the Triton language, so that it runs on any CUDA machine (`benchmarks/kernels/run.py`).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from errno import EISDIR
from functools import partial
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError, OutputError
from adatsq_trt.plugins.catalog import KERNELS, TARGETS
from adatsq_trt.plugins.kernels import cases, quantize
from adatsq_trt.plugins.kernels.cases import GEMMS, Problem
from adatsq_trt.plugins.tiles import Place, Tile, Tiles, load_tiles, tile_for
from adatsq_trt.timed_kernels import (
    EVEN_ODD,
    GEMM_FP8,
    MATMUL_16,
    NATURAL,
    QUANTIZE_FP8,
    QUANTIZE_TOKENS,
    gemm_row,
    quantizer_row,
)

log = logging.getLogger("adatsq_trt.plugins.benchmark")

# (N, K) of the linear layers of Flux-dev, and tokens: prompts, small and full pictures; few, where memory decides.
LAYERS = ((3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072))
_TIMED_SHAPES = tuple((m, n, k) for m in (16, 64, 512, 1024, 4608) for n, k in LAYERS)
_CHECKED_SHAPES = ((1, 64, 128), (17, 80, 256), (130, 336, 1152), (333, 1040, 3072))
_CEILING_SIZE = 8192
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Timing:
    """One multiplication.

    Attributes:
        what: a kernel with its group, or PyTorch's function.
        m, n, k: the shape.
        median_ms: of repetitions over at least 100 ms, after 25 ms of warm-up, the L2 cache emptied before each.
        p20_ms, p80_ms: their spread.
        of_bf16: time of torch.matmul in bf16 divided by this one: above 1 is faster.
        of_ceiling: operations per second, divided by those of a large torch.matmul in bf16 on this card, at its best.
    """

    what: str
    m: int
    n: int
    k: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    of_bf16: float
    of_ceiling: float


def require_gpu() -> str:
    """This card's target.

    Raises:
        DependencyError: there is no GPU, or none that the kernels are made for.
    """
    if not torch.cuda.is_available():
        raise DependencyError(
            "benchmarking kernels needs an NVIDIA GPU and a CUDA build of torch, and torch sees none; run it on a "
            "machine that has them (nothing was written)"
        )
    major, minor = torch.cuda.get_device_capability()
    # As the plugin chooses a cubin: exact, or of the same family below sm90.
    family = [f"sm{major}{lower}" for lower in range(minor, -1, -1)][: None if major < 9 else 1]
    for name in family:
        if name in TARGETS:
            return name
    raise DependencyError(f"there are no kernels for sm{major}{minor}; they are made for {', '.join(TARGETS)}")


def places(target: str) -> Iterator[Place]:
    """Every GEMM of a target."""
    for name in GEMMS:
        if target in KERNELS[name].targets:
            yield from (Place(name, target, group) for group in KERNELS[name].groups)


def check(
    tiles: Tiles, target: str, device: str = "cuda", shapes: Sequence[tuple[int, int, int]] = _CHECKED_SHAPES
) -> int:
    """Run every kernel with every tile against its reference; gives the number of comparisons.

    Args:
        tiles: how the kernels are cut.
        target: target of the kernels.
        device: device that they run on: "cpu" is for the interpreter.
        shapes: (M, N, K).

    Raises:
        AdatsqError: names those that are wrong.
    """
    wrong: list[str] = []
    count = 0
    for place in places(target):
        found, compared = wrong_tiles(place, tiles[place], device, shapes)
        wrong, count = wrong + found, count + compared
    count += _check_quantizers(wrong, target, device)
    if wrong:
        raise AdatsqError(f"{len(wrong)} of {count} comparisons failed, so nothing was timed: {'; '.join(wrong)}")
    return count


def wrong_tiles(
    place: Place,
    tiles: Sequence[Tile],
    device: str = "cuda",
    shapes: Sequence[tuple[int, int, int]] = _CHECKED_SHAPES,
) -> tuple[list[str], int]:
    """Compare one GEMM with its reference; gives what differs, and the number of comparisons.

    Args:
        place: the kernel.
        tiles: how it is cut.
        device: device that it runs on: "cpu" is for the interpreter.
        shapes: (M, N, K).
    """
    wrong, count = [], 0
    for (m, n, k), dtype in itertools.product(shapes, _DTYPES):
        case = GEMMS[place.kernel](Problem(m, n, k, dtype, m % 2 == 1, m, device), place.group)
        reference = case.reference()
        bound = reference.bound(dtype, case.roundings, case.unit)
        for tile in tiles:
            case.y.fill_(torch.nan)
            y, count = case.launch(tile), count + 1
            if not bool(((y.double() - reference.value).abs() <= bound).all()):
                wrong.append(f"{place.kernel} group {place.group} {dtype} [{m}, {n}, {k}] {tile}")
    return wrong, count


def _check_quantizers(wrong: list[str], target: str, device: str) -> int:
    """Quantizers give PyTorch's bits."""
    count = 0
    for dtype in _DTYPES:
        x = torch.randn(5, 3072, device=device).to(dtype)
        expected, scale = quantize.quantize_tokens_reference(x, None)
        for even_odd in (False, True):
            q, q_scale = cases.quantize_tokens(x, None, 127.0, even_odd)
            wanted = quantize.even_odd(expected) if even_odd else expected
            wrong += [] if torch.equal(q, wanted) and torch.equal(q_scale, scale) else [f"quantize_tokens {dtype}"]
            count += 1
        if target in KERNELS[QUANTIZE_FP8].targets:
            step = torch.tensor([0.01], device=device)
            same = (
                cases.quantize_fp8(x, step)
                .view(torch.uint8)
                .equal(quantize.quantize_fp8_reference(x, step).view(torch.uint8))
            )
            wrong += [] if same else [f"quantize_fp8 {dtype}"]
            count += 1
    return count


def _candidates(
    tiles: Tiles, target: str, device: str, m: int, n: int, k: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the functions to time on one shape, torch.matmul first; weights and inputs are quantized beforehand."""
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    yield MATMUL_16, lambda: x @ w.T
    codes, w_codes = (torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8) for rows in (m, n))
    if m > 16:  # a condition of torch._int_mm
        yield "torch._int_mm", lambda: torch._int_mm(codes, w_codes.T)
    if target in KERNELS[GEMM_FP8].targets:
        one, (a, b) = torch.ones((), device=device), (t.to(torch.float8_e4m3fn) for t in (x, w))
        yield "torch._scaled_mm", lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)
        yield quantizer_row(QUANTIZE_FP8), partial(cases.quantize_fp8, x, torch.full((1,), 0.01, device=device))
    for order in (NATURAL, EVEN_ODD):
        yield quantizer_row(QUANTIZE_TOKENS, order), partial(cases.quantize_tokens, x, None, 127.0, order == EVEN_ODD)
    for place in places(target):
        case = GEMMS[place.kernel](Problem(m, n, k, torch.bfloat16, device=device), place.group)
        yield gemm_row(place.kernel, place.group), partial(case.launch, tile_for(tiles[place], m))


def measure(
    tiles: Tiles,
    target: str,
    device: str = "cuda",
    shapes: Sequence[tuple[int, int, int]] = _TIMED_SHAPES,
    largest: int = _CEILING_SIZE,
) -> list[Timing]:
    """Time everything on every shape.

    Args:
        tiles: how the kernels are cut.
        target: target of the kernels.
        device: device that they run on: "cpu" is for the interpreter.
        shapes: (M, N, K).
        largest: rows and columns of the square matrices whose multiplication is taken for the card's ceiling.
    """
    square = torch.randn(largest, largest, device=device, dtype=torch.bfloat16)
    ceiling = largest**3 / do_bench(lambda: square @ square, return_mode="min")
    timings = []
    for m, n, k in shapes:
        bf16 = math.nan
        for what, run in _candidates(tiles, target, device, m, n, k):
            median, low, high = do_bench(run, quantiles=[0.5, 0.2, 0.8])
            bf16 = median if what == MATMUL_16 else bf16
            rate = m * n * k / median / ceiling
            timings.append(Timing(what, m, n, k, median, low, high, bf16 / median, rate))
            log.info("%-24s M %5d N %5d K %5d: %.4f ms, %.2f × bf16", what, m, n, k, median, bf16 / median)
    return timings


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a temporary name beside `output`, which gets its content at the end; an unfit place is told at once.

    Raises:
        OutputError: `output` is a folder, or cannot be written.
    """
    part = output.parent / f".{output.name}.part"
    try:
        if output.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        part.touch()
    except OSError as error:
        raise OutputError(f"cannot write '{output}': {error.strerror}; choose a file in a writable folder") from error
    try:
        yield part
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _require_complete(tiles: Tiles, target: str) -> None:
    missing = [place for place in places(target) if place not in tiles]
    if missing:
        raise DamagedFileError(
            f"the table of tiles has none for {missing[0].kernel} with group {missing[0].group} on {target}; add a row"
        )


def benchmark(output: Path, table: Path | None = None) -> None:
    """Check and time the kernels of this card and write the results; nothing is written when one of them is wrong.

    Args:
        output: JSON file.
        table: of tiles; None for the package's.

    Raises:
        DependencyError: there is no suitable GPU.
        DamagedFileError: the table lacks a tile.
        OutputError: the file cannot be written.
        AdatsqError: a kernel is wrong.
    """
    target = require_gpu()
    tiles = load_tiles(table) if table else load_tiles()
    _require_complete(tiles, target)
    with written_whole(output) as part:
        log.info("%d comparisons with PyTorch hold", check(tiles, target))
        results = {
            "schema_version": 1,
            "measured": True,
            "date": datetime.now(UTC).date().isoformat(),
            "card": torch.cuda.get_device_name(),
            "target": target,
            "torch": torch.__version__,
            "triton_language": triton.__version__,
            "timings": [asdict(timing) for timing in measure(tiles, target)],
        }
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

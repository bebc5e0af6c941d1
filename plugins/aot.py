"""Ahead-of-time compilation: the kernels as cubins for GPUs that need not be there.

The Triton language has its own compiler and brings NVIDIA's assembler along. Each variant is compiled in a process of
a pool, in which `TRITON_INTERPRET` and the compiler's cache play no part.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.errors import AdatsqError, DamagedFileError
from adatsq_trt.files import write_bytes, write_json_model
from adatsq_trt.plugins.catalog import DTYPES, KERNELS, SHARED_BYTES
from adatsq_trt.plugins.tiles import Place, Tile, Tiles
from adatsq_trt.timed_kernels import EVEN_ODD, QUANTIZE_TOKENS

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

TABLE_NAME = "kernels.json"

ParameterType = Literal["pointer", "int32", "float32"]
_PARAMETER_TYPES: dict[str, ParameterType] = {"i32": "int32", "fp32": "float32"}
_PTX_TYPES = {"u64": "pointer", "u32": "int32", "b32": "float32", "f32": "float32"}
# What the compiler appends to every kernel's parameters; kernels here leave them unused, and a launch passes NULL.
_SCRATCH = ("global_scratch", "profile_scratch")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parameter(_Record):
    """One value that a launch passes.

    Attributes:
        name: as the kernel calls it.
        type: its kind; pointers have 64 bits.
    """

    name: str
    type: ParameterType


class CompiledVariant(_Record):
    """One cubin.

    Attributes:
        kernel: the function.
        target: compute capability, such as sm90.
        dtype: of x and y: fp16 or bf16.
        group: elements of K that share a weight scale; 0 where there are no groups.
        order: of K in int8 activations: natural, or even_odd (all even k, then all odd ones).
        block_m, block_n, block_k, group_m, num_warps, num_stages: the tile.
        shared_bytes: dynamic shared memory of a launch.
        registers: of a thread.
        spill_bytes: stack frame, spill stores and spill loads of a thread.
        symbol: name of the function in the cubin.
        file: the cubin, beside the table.
        sha256: of the cubin.
        parameters: of a launch, in order.
        divisible_by_16: parameters whose value the code takes for a multiple of 16.
    """

    kernel: str
    target: str
    dtype: str
    group: int
    order: str
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    symbol: str
    file: str
    sha256: str
    parameters: tuple[Parameter, ...]
    divisible_by_16: tuple[str, ...]


class KernelTable(_Record):
    """Content of a folder of cubins.

    Attributes:
        schema_version: of this file.
        kernels: every cubin.
    """

    schema_version: Literal[1] = 1
    kernels: tuple[CompiledVariant, ...]


@dataclass(frozen=True)
class Variant:
    """Kernel variant to compile: its place in the table of tiles, and all that a cubin fixes.

    Attributes:
        place: kernel, target and group.
        dtype: of x and y: fp16 or bf16.
        order: of K in int8 activations.
        tile: how it is cut.
    """

    place: Place
    dtype: str
    order: str
    tile: Tile

    @property
    def name(self) -> str:
        """Name of the file and in messages."""
        group = f"_g{self.place.group}" if self.place.group else ""
        order = "_even_odd" if self.place.kernel == QUANTIZE_TOKENS and self.order == EVEN_ODD else ""
        block = f"{self.tile.block_m}x{self.tile.block_n}x{self.tile.block_k}"
        return f"{self.place.kernel}{group}{order}_{self.dtype}_{block}_{self.place.target}"


def variants(targets: Iterable[str], tiles: Tiles) -> Iterator[Variant]:
    """Everything that the plugin needs on these targets.

    Raises:
        DamagedFileError: the table lacks a tile.
    """
    for target in targets:
        for kernel in KERNELS.values():
            for group in kernel.groups if target in kernel.targets else ():
                place = Place(kernel.name, target, group)
                if place not in tiles:
                    raise DamagedFileError(
                        f"the table of tiles has none for {kernel.name} with group {group} on {target}; add a row or "
                        f"leave {target} out of --targets"
                    )
                for tile in tiles[place]:
                    for dtype in DTYPES:
                        yield from (Variant(place, dtype, order, tile) for order in kernel.orders)


def compile_kernels(
    wanted: Sequence[Variant], folder: Path, jobs: int, advance: Callable[[], None] = lambda: None
) -> KernelTable:
    """Compile variants and write cubins with their table; nothing is written unless all of them are sound.

    Args:
        wanted: variants to compile.
        folder: cubins that another table left here are removed.
        jobs: processes.
        advance: called after each variant.

    Raises:
        AdatsqError: the compiler fails, or a kernel spills registers or needs more shared memory than its target has.
        OutputError: the folder cannot be written.
    """
    with compiler_pool(jobs) as pool:
        waiting = {pool.submit(compile_variant, variant): variant for variant in wanted}
        results = {}
        try:
            for done in as_completed(waiting):
                results[waiting[done]] = done.result()
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    compiled = [results[variant] for variant in wanted]
    if unsound := [fault for entry, _ in compiled for fault in faults(entry)]:
        raise AdatsqError(f"{'; '.join(unsound)}; nothing was written: choose smaller tiles or fewer stages for these")
    table = KernelTable(kernels=tuple(entry for entry, _ in compiled))
    for entry, cubin in compiled:
        write_bytes(folder / entry.file, cubin)
    write_json_model(folder / TABLE_NAME, table)
    for old in set(folder.glob("*.cubin")) - {folder / entry.file for entry, _ in compiled}:
        old.unlink()
    return table


@contextlib.contextmanager
def compiler_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `compile_variant`."""
    # Spawned, since a fork would inherit torch's threads and the mode in which kernels were imported.
    context = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_process, initargs=(cache,)) as pool,
    ):
        yield pool


def _prepare_process(cache: str) -> None:
    """Settings that the Triton language reads when it is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # the only place that counts spills
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # paths of this machine would change the cubins


def compile_variant(variant: Variant) -> tuple[CompiledVariant, bytes]:
    """Compile one variant; gives its row of the table and its cubin.

    Raises:
        AdatsqError: the compiler fails.
    """
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = _compile(variant)
    except Exception as error:
        last = str(error).strip().splitlines()[-1]  # what stands above it is the kernel's source
        raise AdatsqError(f"the Triton language cannot compile {variant.name}: {last}") from error
    kernel, cubin = KERNELS[variant.place.kernel], compiled.asm["cubin"]
    entry = CompiledVariant(
        **vars(variant.place),
        **vars(variant.tile) | {"num_warps": compiled.metadata.num_warps},
        dtype=variant.dtype,
        order=variant.order,
        shared_bytes=compiled.metadata.shared,
        registers=_count(r"Used (\d+) registers", log.getvalue()),
        spill_bytes=_count(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()
        ),
        symbol=compiled.metadata.name,
        file=f"{variant.name}.cubin",
        sha256=hashlib.sha256(cubin).hexdigest(),
        parameters=_parameters(variant, compiled.asm["ptx"]),
        divisible_by_16=tuple(n for n, t in kernel.parameters if t.startswith("*") or n in kernel.divisible),
    )
    return entry, cubin


def _compile(variant: Variant) -> CompiledKernel:
    """Run the compiler on a function of `adatsq_trt.plugins.kernels`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, tile = KERNELS[variant.place.kernel], variant.tile
    function = getattr(importlib.import_module(f"adatsq_trt.plugins.kernels.{kernel.module}"), kernel.name)
    signature = {name: kind.replace("*16", f"*{variant.dtype}") for name, kind in kernel.parameters}
    fixed = {name.upper(): value for name, value in vars(tile).items()} | {"EVEN_ODD": variant.order == EVEN_ODD}
    constants = {name: fixed[name] for name in function.arg_names if name not in signature}
    aligned = [
        index for index, (name, kind) in enumerate(kernel.parameters) if kind[0] == "*" or name in kernel.divisible
    ]
    source = ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", int(variant.place.target.removeprefix("sm")), 32), options)


def _parameters(variant: Variant, ptx: str) -> tuple[Parameter, ...]:
    """The launch's parameters, held against those that the assembler saw."""
    kernel = KERNELS[variant.place.kernel]
    named = [Parameter(name=name, type=_PARAMETER_TYPES.get(kind, "pointer")) for name, kind in kernel.parameters]
    named += [Parameter(name=name, type="pointer") for name in _SCRATCH]
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    got = [_PTX_TYPES.get(kind, kind) for kind in re.findall(r"\.param\s+\.(\w+)", entry[1] if entry else "")]
    if got != [parameter.type for parameter in named]:
        raise AdatsqError(
            f"{variant.name} has parameters of types {', '.join(got)}, expected {', '.join(p.type for p in named)}; "
            "this version of the Triton language passes them in another way: use the one that constraints.txt pins"
        )
    return tuple(named)


def _count(pattern: str, log: str) -> int:
    """Sum of the numbers that the assembler reports."""
    found = re.search(pattern, log)
    if found is None:
        raise AdatsqError(
            f"the assembler's log has no '{pattern}'; use the version of triton that constraints.txt pins"
        )
    return sum(map(int, found.groups()))


def faults(entry: CompiledVariant) -> list[str]:
    """Why a cubin would run slowly or not at all; nothing for a sound one."""
    found = []
    if entry.spill_bytes:
        found.append(f"{entry.file} spills {entry.spill_bytes} bytes")
    room = SHARED_BYTES[entry.target]
    if entry.shared_bytes > room:
        found.append(f"{entry.file} needs {entry.shared_bytes} bytes of shared memory, {entry.target} has {room}")
    return found

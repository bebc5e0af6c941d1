"""`adatsq-trt build plugins`: cubins for every target, and the TensorRT plugin library around them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from adatsq_trt.errors import AdatsqError, DependencyError, OutputError, UnknownNameError
from adatsq_trt.plugins.aot import TABLE_NAME, KernelTable, compile_kernels, variants
from adatsq_trt.plugins.catalog import TARGETS
from adatsq_trt.plugins.tiles import Tiles

KERNELS_FOLDER, CMAKE_FOLDER, LIBRARY_NAME = "kernels", "cmake", "libadatsq_plugins.so"
_SOURCES = Path(__file__).with_name("library")
_HEADER = "NvInferRuntime.h"
_SYSTEM_HEADERS = (Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include"), Path("/usr/local/tensorrt/include"))


@dataclass(frozen=True)
class Built:
    """Result of `build plugins`.

    Attributes:
        table: of the cubins.
        library: the plugin library; None where it was left out.
        left_out: reason that there is no library and how to get it; empty when there is one.
    """

    table: KernelTable
    library: Path | None
    left_out: str


def require_targets(names: Iterable[str]) -> tuple[str, ...]:
    """Targets without repetitions.

    Raises:
        UnknownNameError: there are no kernels for one of them.
    """
    wanted = tuple(dict.fromkeys(name.strip() for name in names))
    for name in wanted:
        if name not in TARGETS:
            raise UnknownNameError("target", name, TARGETS)
    return wanted


def build_plugins(
    targets: Iterable[str],
    output: Path,
    tiles: Tiles,
    jobs: int,
    tensorrt_root: Path | None = None,
    start: Callable[[int], Callable[[], None]] = lambda _total: lambda: None,
) -> Built:
    """Compile the kernels, then the library where TensorRT's headers are.

    Args:
        targets: such as sm90.
        output: folder for kernels/ and the library; empty, or that of an earlier build.
        tiles: how the kernels are cut.
        jobs: processes.
        tensorrt_root: folder whose include/ holds TensorRT's headers; None for TENSORRT_ROOT or the system's.
        start: called with the number of cubins; gives the function that is called after each.

    Raises:
        DependencyError: the Triton language is not installed.
        OutputError: the folder holds other files.
        AdatsqError: a compiler fails, or a kernel spills registers.
    """
    if importlib.util.find_spec("triton") is None:
        raise DependencyError("compiling kernels needs the Triton language; run: pip install 'adatsq-trt[plugins]'")
    wanted = list(variants(require_targets(targets), tiles))
    _require_own(output)
    table = compile_kernels(wanted, output / KERNELS_FOLDER, jobs, start(len(wanted)))
    left_out = _missing(tensorrt_root)
    library = None if left_out else _build_library(output, jobs, tensorrt_root)
    return Built(table, library, left_out)


def _require_own(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()) and not (output / KERNELS_FOLDER / TABLE_NAME).is_file():
        raise OutputError(f"--output '{output}' is not empty and holds no earlier build; choose another folder")
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output '{output}' is a file; choose a folder")


def _missing(tensorrt_root: Path | None) -> str:
    """Why the library cannot be built here; empty when it can."""
    if not (_SOURCES / "CMakeLists.txt").is_file():
        return "the library was left out: its sources are not installed; build from a checkout of adatsq-trt"
    if shutil.which("cmake") is None:
        return "the library was left out: there is no cmake on PATH; run 'pip install cmake' and build again"
    root = tensorrt_root or (Path(os.environ["TENSORRT_ROOT"]) if os.environ.get("TENSORRT_ROOT") else None)
    folders = (root / "include", root) if root else _SYSTEM_HEADERS
    if not any((folder / _HEADER).is_file() for folder in folders):
        where = ", ".join(map(str, folders))
        return (
            f"the library was left out: no TensorRT headers ({_HEADER}) in {where}; point --tensorrt-root to a folder "
            "with include/ from TensorRT 10.13 to 11 (github.com/NVIDIA/TensorRT has them) and build again"
        )
    return ""


def _build_library(output: Path, jobs: int, tensorrt_root: Path | None) -> Path:
    """Run CMake on the sources beside this file.

    Raises:
        AdatsqError: it fails; the message ends with what it said last.
    """
    folder = output / CMAKE_FOLDER
    configure = ["cmake", "-S", str(_SOURCES), "-B", str(folder)]
    configure.append(f"-DADATSQ_KERNELS={(output / KERNELS_FOLDER).resolve()}")
    if tensorrt_root:
        configure.append(f"-DTENSORRT_ROOT={tensorrt_root.resolve()}")
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", str(jobs)]):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-20:])
            raise AdatsqError(f"the library does not build; '{' '.join(command)}' said:\n{said}")
    return Path(shutil.copy2(folder / LIBRARY_NAME, output / LIBRARY_NAME))

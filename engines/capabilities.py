"""Libraries, compilers, GPU and disk of this machine: whether they are there and work, and how to get them."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_GIGABYTE = 10**9
_ENOUGH_DISK_BYTES = 2 * _GIGABYTE


@dataclass(frozen=True)
class Capability:
    """One thing that the machine has or lacks.

    Attributes:
        name: of the library, tool or resource.
        found: whether it is there and works.
        detail: version, devices, or why it does not work.
        needed_for: its use, or that this version does not use it.
        advice: how to get it; empty when it is there.
    """

    name: str
    found: bool
    detail: str
    needed_for: str
    advice: str


@dataclass(frozen=True)
class _Library:
    """A Python library to look for.

    Attributes:
        name: for people.
        module: name to import.
        distributions: names under which it may be installed.
        needed_for: its use.
        install: the command that installs it.
        describe: imports it and says more than the version; raises when it does not work.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    needed_for: str
    install: str
    describe: Callable[[], str] | None = None


def _onnxruntime_providers() -> str:
    import onnxruntime

    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


def _loads(module: str) -> Callable[[], str]:
    """Import a library with native parts: a version alone does not say that they load."""

    def describe() -> str:
        importlib.import_module(module)
        return "loads"

    return describe


_REINSTALL = "pip install -e ."
_LIBRARIES = (
    _Library("torch", "torch", ("torch",), "every stage", _REINSTALL, _loads("torch")),
    _Library("diffusers", "diffusers", ("diffusers",), "models and schedulers", _REINSTALL),
    _Library(
        "TensorRT-RTX",
        "tensorrt_rtx",
        ("tensorrt-rtx",),
        "building engines (no GPU needed)",
        "pip install tensorrt-rtx",
        _loads("tensorrt_rtx"),
    ),
    _Library(
        "TensorRT (enterprise)",
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "build engine --backend tensorrt (on a GPU)",
        "pip install -e '.[tensorrt]'",
        _loads("tensorrt"),
    ),
    _Library(
        "ONNX Runtime",
        "onnxruntime",
        ("onnxruntime-gpu", "onnxruntime"),
        "check and generate",
        "pip install onnxruntime-gpu",
        _onnxruntime_providers,
    ),
    _Library("polygraphy", "polygraphy", ("polygraphy",), "check", "pip install polygraphy"),
    _Library(
        "ModelOpt",
        "modelopt",
        ("nvidia-modelopt",),
        "comparison with other quantizers",
        "pip install -e '.[peers]'",
    ),
    _Library("Ray", "ray", ("ray",), "--ray", "pip install ray", _loads("ray")),
    _Library("Triton language", "triton", ("triton",), "build plugins", "pip install triton"),
)

_COMPILERS = (("g++", "install g++ with the system's package manager"), ("cmake", "pip install cmake"))


def diagnose(folder: Path = Path()) -> list[Capability]:
    """Look at the machine: interpreter, GPU, libraries, compilers, and the disk of `folder`."""
    return [
        Capability("Python", True, platform.python_version(), "everything", ""),
        *(_library(library) for library in _LIBRARIES),
        _triton_server(),
        _gpu(),
        *(_compiler(*row) for row in _COMPILERS),
        _disk(folder),
    ]


def _library(library: _Library) -> Capability:
    version = next(_versions(library.distributions), None)
    if version is None:
        return Capability(library.name, False, "not installed", library.needed_for, library.install)
    try:
        more = library.describe() if library.describe else ""
    except Exception as error:  # a broken native library can raise anything on import
        reason = f"{version}, does not load: {_first_line(str(error))}"
        return Capability(library.name, False, reason, library.needed_for, f"{library.install} --force-reinstall")
    detail = version if more in ("", "loads") else f"{version}: {more}"
    return Capability(library.name, True, detail, library.needed_for, "")


def _versions(distributions: tuple[str, ...]) -> Iterator[str]:
    from importlib import metadata  # takes longer than all of this module

    for name in distributions:
        try:
            yield metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _triton_server() -> Capability:
    """The server that `serve` would start."""
    from adatsq_trt.engines.triton_server.server import INSTALL, Installation
    from adatsq_trt.errors import DependencyError

    name, needed_for = "Triton server", "serve"
    try:
        return Capability(name, True, Installation.find().detail, needed_for, "")
    except DependencyError as error:
        return Capability(name, False, _first_line(str(error)).partition(";")[0], needed_for, INSTALL)


def _gpu() -> Capability:
    name, needed_for = "GPU", "running engines (everything else works without one)"
    try:
        import torch

        if torch.cuda.is_available():
            return Capability(name, True, ", ".join(_gpu_names()), needed_for, "")
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    except Exception as error:
        return Capability(name, False, f"torch: {_first_line(str(error))}", needed_for, _REINSTALL)
    advice = (
        "needs an NVIDIA GPU with a driver"
        if torch.version.cuda
        else "install a CUDA build of torch: https://pytorch.org/get-started"
    )
    return Capability(name, False, f"none seen by torch (build: {build})", needed_for, advice)


def _gpu_names() -> Iterator[str]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / _GIGABYTE
        yield f"{properties.name} (sm{properties.major}{properties.minor}, {memory:.0f} GB)"


def _compiler(name: str, advice: str) -> Capability:
    path, needed_for = shutil.which(name), "build plugins: the library"
    if path is None:
        return Capability(name, False, "not on PATH", needed_for, advice)
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Capability(name, False, f"{path} does not run: {_first_line(str(error))}", needed_for, advice)
    return Capability(name, True, _first_line(answer), needed_for, "")


def _disk(folder: Path) -> Capability:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Capability("disk", False, str(error), "run directories", "choose another folder for --output")
    advice = "" if free >= _ENOUGH_DISK_BYTES else "make room: runs of large models take tens of gigabytes"
    return Capability("disk", not advice, f"{free / _GIGABYTE:.1f} GB free here", "run directories", advice)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")

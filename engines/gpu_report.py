"""Report on a machine with a GPU, on the backends there and how they run a bundle: for a look, or for a bug report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue

from adatsq_trt.engines import accuracy
from adatsq_trt.engines.backends.rtx_steps import RtxSteps
from adatsq_trt.engines.backends.selection import BackendName, reasons
from adatsq_trt.engines.benchmark import benchmark_bundles
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import AdatsqError

_ROUNDS = 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpu(_Record):
    """One GPU, as its driver tells of it.

    Attributes:
        name: of the card.
        capability: compute capability, such as 120.
        memory_bytes: of the card.
    """

    name: str
    capability: int
    memory_bytes: int


class GpuMachine(_Record):
    """Driver, GPUs and libraries of this machine.

    Attributes:
        driver: version of NVIDIA's driver; None where there is none.
        gpus: in the driver's order.
        libraries: name → version, or why it cannot be used.
        torch_sees: PyTorch's names of its GPUs.
    """

    driver: str | None
    gpus: tuple[Gpu, ...]
    libraries: dict[str, str]
    torch_sees: tuple[str, ...]


class Trial(_Record):
    """Something that was tried with a bundle.

    Attributes:
        name: of the trial.
        seconds: duration of the trial.
        result: its figures.
        error: its full text, with where it was raised; None where it went well.
    """

    name: str
    seconds: float
    result: dict[str, JsonValue]
    error: str | None


class GpuReport(_Record):
    """All of it.

    Attributes:
        machine: driver, GPUs and libraries.
        bundle: path of what was tried; None without one.
        backends: best first, why each does not run the bundle here; None where it does.
        trials: in their order; none where no GPU runs the bundle.
    """

    schema_version: Literal[1] = 1
    machine: GpuMachine
    bundle: str | None = None
    backends: dict[BackendName, str | None] = {}
    trials: tuple[Trial, ...] = ()

    @property
    def choice(self) -> BackendName | None:
        """The backend that "auto" takes; None where none runs the bundle."""
        return next((name for name, reason in self.backends.items() if reason is None), None)

    @property
    def passed(self) -> bool:
        """Whether nothing that was tried went wrong."""
        return all(trial.error is None for trial in self.trials)


def look_at_machine() -> GpuMachine:
    """Ask the driver, PyTorch and the libraries about this machine."""
    driver, gpus = _driver()
    return GpuMachine(driver=driver, gpus=gpus, libraries=_libraries(), torch_sees=_torch_sees())


def try_bundle(path: Path, folder: Path, on_trial: Callable[[str], None] | None = None) -> GpuReport:
    """Run a bundle as "auto" would, check and time it, where that is on a GPU.

    Args:
        path: of the bundle or its run directory.
        folder: receives the arrays of the check.
        on_trial: told the name of each trial before it begins.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    files = BundleFiles.open(path)
    report = GpuReport(machine=look_at_machine(), bundle=str(path), backends=reasons(files.manifest))
    if report.choice in (None, "onnxruntime"):
        return report
    trials: dict[str, Callable[[], dict[str, JsonValue]]] = {
        "start and draw": lambda: _draw(files),
        "start again": lambda: _draw(files),
        "check": lambda: _check(files, folder),
        "benchmark": lambda: benchmark_bundles([path], "auto", 1, _ROUNDS).model_dump(mode="json"),
    }
    done = []
    for name, run in trials.items():
        if on_trial is not None:
            on_trial(name)
        done.append(_try(name, run))
    return report.model_copy(update={"trials": tuple(done)})


def _try(name: str, run: Callable[[], dict[str, JsonValue]]) -> Trial:
    began, result, problem = time.perf_counter(), dict[str, JsonValue](), None
    try:
        result = run()
    except Exception:  # whatever the libraries raise belongs into the report
        problem = traceback.format_exc()
    return Trial(name=name, seconds=time.perf_counter() - began, result=result, error=problem)


def _draw(files: BundleFiles) -> dict[str, JsonValue]:
    """Deserialize, the first generation, and one more."""
    seconds = []
    with Bundle(files) as bundle:
        for _ in range(2):
            began = time.perf_counter()
            latents = bundle.denoise(bundle.noise([1]), bundle.conditioning([0]))
            seconds.append(time.perf_counter() - began)
        runner = bundle.runner(quantized=True)
        kernels = runner.kernels if isinstance(runner, RtxSteps) else None
        if not np.isfinite(latents).all():
            raise AdatsqError("the latents have NaN or infinity")
        return {
            "backend": bundle.choice.name,
            "first_seconds": seconds[0],
            "next_seconds": seconds[1],
            "compile_seconds": None if kernels is None else kernels.seconds,
            "known_kernels": None if kernels is None else kernels.known,
            "kernels": None if kernels is None else str(kernels.file),
        }


def _check(files: BundleFiles, folder: Path) -> dict[str, JsonValue]:
    report = accuracy.check(files, folder, backend="auto")
    if not report.passed:
        failed = [f"{row.subject}: {row.finding}" for row in report.rows if not row.passed]
        loops = [loop for loop in (report.loop, report.plan_loop) if loop is not None and not loop.passed]
        failed += [loop.failure or "a denoising loop leaves its tolerance" for loop in loops]
        raise AdatsqError("; ".join(failed) or "something is not as it was exported")
    rows = [row for row in report.rows if row.variant == "plan" and row.block is None]
    worst = max((row.relative_error or 0.0 for row in rows), default=0.0)
    return {"comparisons": len(report.rows), "plans": len(rows), "worst_plan_error": worst}


def _driver() -> tuple[str | None, tuple[Gpu, ...]]:
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return str(pynvml.nvmlSystemGetDriverVersion()), tuple(map(_gpu, handles))
    except pynvml.NVMLError:
        return None, ()


def _gpu(handle: object) -> Gpu:
    import pynvml

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(name=str(pynvml.nvmlDeviceGetName(handle)), capability=10 * major + minor, memory_bytes=memory)


def _libraries() -> dict[str, str]:
    from importlib import import_module

    found = {}
    for module in ("torch", "tensorrt_rtx", "tensorrt", "onnxruntime"):
        try:
            library = import_module(module)
        except Exception as error:  # a broken native library raises anything
            found[module] = f"does not load: {error}"
        else:
            found[module] = str(library.__version__)
    if not found["onnxruntime"].startswith("does not"):
        import onnxruntime

        found["onnxruntime"] += f" ({', '.join(onnxruntime.get_available_providers())})"
    return found


def _torch_sees() -> tuple[str, ...]:
    try:
        import torch
    except ImportError:
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))

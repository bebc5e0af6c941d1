"""A bundle's plans of TensorRT-RTX on a GPU, with a cache of compiled kernels beside the bundle."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.engines.backends.cuda_device import gpu_capability, gpu_name
from adatsq_trt.engines.backends.device_steps import RowBuffers
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.backends.plan_steps import PlanSteps
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles, Manifest, PlanFile
from adatsq_trt.engines.generation import Arrays, as_array
from adatsq_trt.errors import MismatchError, OutputError
from adatsq_trt.files import sha256, write_bytes
from adatsq_trt.formats import TARGETS

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
CACHE_FOLDER = "runtime-cache"
_LIBRARY = "tensorrt-rtx"


def runnable_plans(manifest: Manifest, version: str, capability: int) -> tuple[PlanFile, ...]:
    """The plans that a GPU can run.

    Args:
        manifest: of the bundle.
        version: of the TensorRT-RTX that is installed.
        capability: the GPU's compute capability, such as 120.

    Raises:
        MismatchError: there are none for this GPU, or another library or version of TensorRT-RTX compiled them.
    """
    if manifest.plans and manifest.backend != RtxBackend.name:
        raise MismatchError(
            f"the bundle's plans are of {manifest.backend}, not of TensorRT-RTX; run it with backend "
            f"'{manifest.backend}', or build it again with --backend rtx"
        )
    target = next((name for name, target in TARGETS.items() if target.compute_capability == capability), None)
    plans = tuple(plan for plan in manifest.plans if plan.target == target)
    if not plans:
        built = ", ".join(dict.fromkeys(plan.target for plan in manifest.plans)) or "no GPU"
        raise MismatchError(
            f"this machine's GPU is sm{capability}, the bundle has plans for {built}; build it again with --target "
            f"sm{capability}, or run its cpu graphs with backend 'onnxruntime'"
        )
    if manifest.versions.get(_LIBRARY) != version:
        raise MismatchError(
            f"the bundle's plans are of TensorRT-RTX {manifest.versions.get(_LIBRARY)}, {version} is installed; build "
            f"the bundle again, or run: pip install {_LIBRARY}=={manifest.versions.get(_LIBRARY)}"
        )
    return plans


def plans_here(manifest: Manifest) -> tuple[PlanFile, ...]:
    """The plans that this machine's GPU can run.

    Raises:
        DependencyError: TensorRT-RTX is not installed, or PyTorch sees no GPU.
        MismatchError: as `runnable_plans`.
    """
    backend = RtxBackend()
    backend.require()
    return runnable_plans(manifest, backend.version(), gpu_capability())


@dataclass(frozen=True)
class CompiledKernels:
    """Kernels that TensorRT-RTX compiled just in time.

    Attributes:
        seconds: time of making contexts and of first calls, nearly all of which is compiling.
        known: whether kernels of an earlier run were there.
        file: the cache that keeps them.
    """

    seconds: float
    known: bool
    file: Path

    @property
    def sentence(self) -> str:
        """For the console."""
        known = "with" if self.known else "without"
        return (
            f"TensorRT-RTX took {self.seconds:.1f} s to start {known} kernels of an earlier run; they are kept in "
            f"'{self.file}'"
        )


class RtxSteps(PlanSteps):
    """Engines of TensorRT-RTX, which compiles kernels when a context first meets a shape."""

    def __init__(
        self,
        files: BundleFiles,
        plans: tuple[PlanFile, ...] | None = None,
        keep_kernels: bool = True,
        offload: bool = False,
    ) -> None:
        """Deserialize plans.

        Args:
            files: the bundle.
            plans: those for this machine's GPU unless given.
            keep_kernels: take compiled kernels from earlier runs, and keep them for later ones.
            offload: as of `PlanSteps`.

        Raises:
            UserError: as `plans_here`; TensorRT-RTX refuses a plan.
        """
        self._cache: Any = None
        self._compiled: set[tuple[int | None, int, tuple[int, ...] | None]] = set()
        self._unsaved = False
        self._compile_seconds = 0.0
        self._keep_kernels, self._known = keep_kernels, False
        super().__init__(files, plans_here(files.manifest) if plans is None else plans, RtxBackend(), offload=offload)

    def _make_context(self, engine: Any, captured: bool) -> Any:
        """With CUDA graphs where they can be captured, and the common cache of compiled kernels."""
        config, library = engine.create_runtime_config(), self._library
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._cache_file = cache_file(self._files, gpu_name())
            self._known = self._keep_kernels and self._cache_file.is_file()
            if self._known and not self._cache.deserialize(self._cache_file.read_bytes()):
                self._known = False
                log.warning("'%s' is of another version of TensorRT-RTX; compiling kernels anew", self._cache_file)
        if not config.set_runtime_cache(self._cache):
            log.warning("TensorRT-RTX takes no runtime cache; it compiles kernels at every start")
        config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = library.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if captured else strategies.DISABLED
        began = time.perf_counter()
        context = engine.create_execution_context(config)
        self._compile_seconds += time.perf_counter() - began
        return context

    @property
    def kernels(self) -> CompiledKernels:
        """Kernels that were compiled until now."""
        return CompiledKernels(self._compile_seconds, self._known, self._cache_file)

    def _called(self, held: int | None, rows: int, size: tuple[int, ...] | None, seconds: float) -> None:
        """Note that kernels were compiled, and keep them once the first calls of all engines are done."""
        call = (held, rows, size)
        if call not in self._compiled:
            self._compiled.add(call)
            self._unsaved = True
            self._compile_seconds += seconds
        elif self._unsaved and self._compiled.issuperset((other, rows, size) for other in self._contexts):
            self._save_cache()  # a server or a pipeline may never wait, or be killed

    def synchronize(self) -> None:
        """Wait for the device, and keep what it compiled: a process that is killed later need not compile again."""
        super().synchronize()
        self._save_cache()

    def _free(self) -> None:
        try:
            self._save_cache()
        finally:
            super()._free()

    def _save_cache(self) -> None:
        if not self._unsaved or not self._keep_kernels:
            return
        self._unsaved = False
        log.info("%s", self.kernels.sentence)
        try:
            write_bytes(self._cache_file, bytes(self._cache.serialize()))
        except OutputError as error:
            log.warning("%s; kernels will be compiled again the next time", error)


def compile_kernels(files: BundleFiles) -> CompiledKernels:
    """Call every plan of a bundle once, for one sample, so that its kernels are there when it is used.

    Raises:
        UserError: as `plans_here`; TensorRT-RTX refuses a plan.
    """
    steps = files.policy.step_assignments
    with RtxSteps(files) as runner:
        with runner.working():
            buffers = RowBuffers(runner, 2 if files.two_branches else 1, _first_size(files))
            for assignment in range(len(files.policy.assignments)):
                runner.enqueue(steps.index(assignment), buffers)
        runner.synchronize()
        return runner.kernels


def _first_size(files: BundleFiles) -> tuple[int, ...] | None:
    return files.manifest.shapes[0].size if files.manifest.shapes else None


class ComparisonSteps(RtxSteps):
    """An engine of a graph without formats that takes a bundle's inputs, for comparisons."""

    def __init__(self, files: BundleFiles, plan: bytes, name: str, rows: int) -> None:
        """Deserialize a plan.

        Args:
            files: the bundle.
            plan: for this machine's GPU.
            name: of the plan, in messages.
            rows: most that it takes.

        Raises:
            UserError: TensorRT-RTX refuses it.
        """
        self._plan = plan
        entry = PlanFile(target="none", assignment=None, path=name, bytes=len(plan), max_rows=rows)
        super().__init__(files, (entry,), keep_kernels=False)

    def _read(self, plan: PlanFile) -> bytes:
        return self._plan

    def _held(self, step: int) -> int | None:
        return None

    def _captured(self, held: int | None) -> bool:
        return True


class MarkedSteps(ComparisonSteps):
    """An engine of an assignment that gives values inside of it too."""

    def __init__(self, files: BundleFiles, plan: bytes, name: str, rows: int, marked: tuple[str, ...]) -> None:
        """Deserialize a plan.

        Args:
            files: the bundle.
            plan: for this machine's GPU.
            name: of the plan, in messages.
            rows: most that it takes.
            marked: names of the values.

        Raises:
            UserError: TensorRT-RTX refuses it.
        """
        self._marked = marked
        self._values: dict[str, torch.Tensor] = {}
        super().__init__(files, plan, name, rows)

    def _bind_marked(self, context: EngineContext) -> None:
        for name in context.marked:
            self._values[name] = self._gpu.empty(context.output_shape(name), context.dtype(name))
            context.bind(name, self._values[name].data_ptr())

    def values(self, step: int, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run a step of the engine's assignment; waits for the device.

        Args:
            step: index in the loop.
            inputs: as of `run`.

        Returns:
            Marked value, or the output → array, float32 [rows, ...].
        """
        with self._lock:
            output = as_array(self.run(step, inputs))
            names = {context.output: output for context in self._contexts.values()}
            return {**{name: as_array(value) for name, value in self._values.items()}, **names}


def cache_file(files: BundleFiles, gpu: str) -> Path:
    """Where compiled kernels are kept: beside the bundle, or in the user's cache folder where that is read-only.

    Args:
        files: the bundle; another one has other kernels.
        gpu: its name and its driver's version.
    """
    digest = hashlib.sha256(f"{sha256(files.folder / MANIFEST_NAME)} {gpu}".encode()).hexdigest()[:16]
    return cache_folder(files, CACHE_FOLDER) / f"{digest}.bin"


def cache_folder(files: BundleFiles, name: str) -> Path:
    """A folder beside a bundle, or in the user's cache folder where that is read-only.

    Args:
        files: the bundle.
        name: of the folder.
    """
    beside = files.folder.parent
    folder = beside / name
    if not os.access(folder if folder.exists() else beside, os.W_OK):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "adatsq-trt", name)
    return folder

"""A bundle's plans of TensorRT-RTX on a GPU, with a cache of compiled kernels beside the bundle."""

from __future__ import annotations

import logging
from typing import Any

from adatsq_trt.engines.backends.plan_steps import PlanSteps, gpu_capability
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile
from adatsq_trt.errors import MismatchError, OutputError
from adatsq_trt.files import write_bytes
from adatsq_trt.formats import TARGETS

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
        MismatchError: there are none for this GPU, or another version of TensorRT-RTX compiled them.
    """
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


class RtxSteps(PlanSteps):
    """Engines of TensorRT-RTX."""

    def __init__(self, files: BundleFiles) -> None:
        """Deserialize the plans for this machine's GPU.

        Raises:
            UserError: as `plans_here`; TensorRT-RTX refuses a plan.
        """
        plans = plans_here(files.manifest)
        self._cache_file = files.folder.parent / CACHE_FOLDER / f"{plans[0].target}.bin"
        self._cache: Any = None
        super().__init__(files, plans, RtxBackend())

    def _make_context(self, engine: Any) -> Any:
        """With CUDA graphs and the common cache of compiled kernels."""
        config, library = engine.create_runtime_config(), self._library
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_file.is_file() and not self._cache.deserialize(self._cache_file.read_bytes()):
                log.warning("'%s' is of another driver, GPU or version; compiling kernels anew", self._cache_file)
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def close(self) -> None:
        """Keep what was compiled for the next time and free the engines."""
        if self._cache is not None:
            try:
                write_bytes(self._cache_file, bytes(self._cache.serialize()))
            except OutputError as error:
                log.warning("%s; kernels will be compiled again the next time", error)
        super().close()

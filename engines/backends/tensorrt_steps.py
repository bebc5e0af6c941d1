"""A bundle's plans of enterprise TensorRT on a GPU."""

from __future__ import annotations

from typing import Any

from adatsq_trt.engines.backends.cuda_device import gpu_capability
from adatsq_trt.engines.backends.plan_steps import PlanSteps
from adatsq_trt.engines.backends.tensorrt import (
    LIBRARY,
    TensorRTBackend,
    load_plugins,
    runs_capability,
    runs_version,
)
from adatsq_trt.engines.bundle import PLUGIN_LIBRARY, BundleFiles, Manifest, PlanFile
from adatsq_trt.errors import MismatchError
from adatsq_trt.formats import PLUGIN_LAYOUT, TARGETS


def runnable_plans(manifest: Manifest, version: str, capability: int) -> tuple[PlanFile, ...]:
    """The plans that a GPU can run, all of one target: its own, if there are such.

    Args:
        manifest: of the bundle.
        version: of the TensorRT that is installed.
        capability: the GPU's compute capability, such as 89.

    Raises:
        MismatchError: there are none for this GPU, or of another library or version.
    """
    built = manifest.versions.get(LIBRARY)
    if manifest.backend != LIBRARY or built is None:
        raise MismatchError(
            f"the bundle's plans are of {manifest.backend}, not of TensorRT; run it with backend "
            f"'{manifest.backend}', or build it again with --backend tensorrt"
        )
    compatibility, exact = manifest.compatibility, f"sm{capability}"
    fitting = [
        plan.target
        for plan in manifest.plans
        if runs_capability(TARGETS[plan.target].compute_capability or 0, capability, compatibility)
    ]
    if not fitting:
        targets = ", ".join(dict.fromkeys(plan.target for plan in manifest.plans)) or "no GPU"
        raise MismatchError(
            f"this machine's GPU is sm{capability}, the bundle has plans for {targets}; build it again with --target "
            f"sm{capability}, or run its cpu graphs with backend 'onnxruntime'"
        )
    if not runs_version(built, version, compatibility):
        raise MismatchError(
            f"the bundle's plans are of TensorRT {built}, {version} is installed; build the bundle again, if need be "
            f"with --version-compatible, or run: pip install {LIBRARY}=={built}"
        )
    chosen = exact if exact in fitting else fitting[0]
    return tuple(plan for plan in manifest.plans if plan.target == chosen)


def plans_here(manifest: Manifest) -> tuple[PlanFile, ...]:
    """The plans that this machine's GPU can run.

    Raises:
        DependencyError: TensorRT is not installed or too old, or PyTorch sees no GPU.
        MismatchError: as `runnable_plans`.
    """
    backend = TensorRTBackend()
    backend.require()
    return runnable_plans(manifest, backend.version(), gpu_capability())


class TensorRTSteps(PlanSteps):
    """Engines of TensorRT; without CUDA graphs, since those of layout `switch` cannot be captured."""

    def __init__(self, files: BundleFiles, offload: bool = False) -> None:
        """Deserialize the plans for this machine's GPU.

        Args:
            files: the bundle.
            offload: as of `PlanSteps`.

        Raises:
            UserError: as `plans_here`; TensorRT refuses a plan.
        """
        super().__init__(files, plans_here(files.manifest), TensorRTBackend(), offload=offload)

    def _prepare_runtime(self, runtime: Any) -> None:
        # Plans for other versions bring the program that runs them; their hashes have been checked.
        runtime.engine_host_code_allowed = self._files.manifest.compatibility.versions
        if self._files.manifest.layout == PLUGIN_LAYOUT:
            load_plugins(runtime.get_plugin_registry(), self._files.file(PLUGIN_LIBRARY))

    def _make_context(self, engine: Any, captured: bool) -> Any:
        """With as many weights on the GPU as fit, if the plan allows it."""
        if engine.streamable_weights_size:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine.create_execution_context(self._library.ExecutionContextAllocationStrategy.USER_MANAGED)

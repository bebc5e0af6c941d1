"""Selection of the backend that runs a bundle on this machine: the best that there is, and why nothing better."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from adatsq_trt.engines.backends import rtx_steps, tensorrt_steps
from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.cuda_device import gpu_is_here
from adatsq_trt.engines.backends.onnxruntime import ExpertSteps, OnnxRuntimeSteps, require_cuda
from adatsq_trt.engines.backends.onnxruntime_gpu import OnnxRuntimeGpuSteps
from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile
from adatsq_trt.errors import AdatsqError, UnknownNameError, UserError

log = logging.getLogger(__name__)
BackendName: TypeAlias = Literal["auto", "rtx", "tensorrt", "cuda", "onnxruntime"]
# What is given back while the loop does not need it: nothing, or the transformer of other steps.
Offload: TypeAlias = Literal["none", "expert"]
_TITLES: dict[BackendName, str] = {
    "rtx": "TensorRT-RTX plans",
    "tensorrt": "TensorRT plans",
    "cuda": "ONNX Runtime on the GPU",
    "onnxruntime": "ONNX Runtime on the processor",
}


@dataclass(frozen=True)
class BackendChoice:
    """Backend that runs a bundle, and those that were passed over.

    Attributes:
        name: of the backend; never "auto".
        plans: those that it runs; none where graphs are run.
        passed_over: better backends, and why they do not run the bundle here.
    """

    name: BackendName
    plans: tuple[PlanFile, ...] = ()
    passed_over: tuple[tuple[BackendName, str], ...] = ()

    @property
    def sentence(self) -> str:
        """One line for the console."""
        last = self.passed_over[-1:] and f"; not {_TITLES[self.passed_over[-1][0]]}: {self.passed_over[-1][1]}"
        return f"runs in {_TITLES[self.name]}{last or ''}"


def choose(manifest: Manifest, backend: BackendName = "auto") -> BackendChoice:
    """The backend that runs a bundle here.

    Args:
        manifest: of the bundle.
        backend: the one to use; "auto" for the best.

    Raises:
        UserError: the backend that was asked for does not run this bundle here; says why.
    """
    if backend == "auto":
        return _best(manifest)
    return BackendChoice(backend, _PLANS[backend](manifest))


def _best(manifest: Manifest) -> BackendChoice:
    if not gpu_is_here():  # told without importing PyTorch and TensorRT, which takes seconds
        return BackendChoice("onnxruntime", passed_over=(("cuda", "there is no NVIDIA driver"),))
    passed_over: list[tuple[BackendName, str]] = []
    for name, plans_here in _PLANS.items():
        try:
            return BackendChoice(name, plans_here(manifest), tuple(passed_over))
        except UserError as error:
            passed_over.append((name, str(error)))
    raise UserError(f"nothing here runs the bundle: {passed_over[-1][1]}")


def reasons(manifest: Manifest) -> dict[BackendName, str | None]:
    """For every backend, best first, why it does not run a bundle here; None where it does."""
    found: dict[BackendName, str | None] = {}
    for name, plans_here in _PLANS.items():
        try:
            plans_here(manifest)
        except UserError as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found


def _no_plans(manifest: Manifest) -> tuple[PlanFile, ...]:
    return ()


def _on_cuda(manifest: Manifest) -> tuple[PlanFile, ...]:
    require_cuda()
    if manifest.schedule.experts:
        raise UserError(
            "the graphs of a bundle of two transformers run on the processor; build it for this GPU, whose plans run "
            "there, or pass --backend onnxruntime"
        )
    return ()


# Best first: what each runs here, or why it does not.
_PLANS: dict[BackendName, Callable[[Manifest], tuple[PlanFile, ...]]] = {
    "rtx": lambda manifest: rtx_steps.plans_here(manifest),
    "tensorrt": lambda manifest: tensorrt_steps.plans_here(manifest),
    "cuda": _on_cuda,
    "onnxruntime": _no_plans,
}


def require_offload(files: BundleFiles, offload: Offload) -> None:
    """Refuse to give back what there is not.

    Raises:
        UserError: another word; or one transformer, which all steps need.
    """
    if offload not in get_args(Offload):
        raise UnknownNameError("--offload", str(offload), get_args(Offload))
    if offload == "expert" and len(files.experts) == 1:
        raise UserError(
            f"--offload expert: the bundle '{files.folder}' has one transformer, which all steps need; leave it out"
        )


def make_runner(
    files: BundleFiles, choice: BackendChoice, quantized: bool = True, offload: Offload = "none"
) -> StepRunner:
    """Make the runner of a bundle's steps.

    Args:
        files: the bundle.
        choice: of `choose`.
        quantized: follow the policy; otherwise the full-precision graph, of which there are no plans: on a GPU it runs
            in ONNX Runtime there, where that has CUDA.
        offload: "expert" loads a transformer when its first step comes, once the other is given back.

    Raises:
        UserError: a library refuses a plan or a graph.
    """
    apart = offload == "expert"
    if quantized and choice.name == "rtx":
        return rtx_steps.RtxSteps(files, offload=apart)
    if quantized and choice.name == "tensorrt":
        return tensorrt_steps.TensorRTSteps(files, offload=apart)
    variant = "cpu" if quantized else "reference"
    on_gpu = choice.name == "cuda" or (bool(choice.plans) and _onnxruntime_has_cuda())
    if len(files.experts) == 1:
        graph = files.graph(variant, None)
        return OnnxRuntimeGpuSteps(files, graph) if on_gpu else OnnxRuntimeSteps(files, graph)
    return ExpertSteps(files, lambda expert: OnnxRuntimeSteps(files, files.graph(variant, None, expert)), apart)


def _onnxruntime_has_cuda() -> bool:
    try:
        require_cuda()
    except UserError as error:
        log.info("full precision runs on the processor: %s", error)
        return False
    return True


def compile_where_plans_run(files: BundleFiles) -> str | None:
    """Compile now, where a bundle's plans run here, what TensorRT-RTX would compile at their first use.

    Returns:
        How long it took, or why the plans do not run on the GPU that is here; None where others run the bundle.
    """
    if choose(files.manifest).name != "rtx":
        return None
    try:
        return rtx_steps.compile_kernels(files).sentence
    except (AdatsqError, RuntimeError) as error:  # PyTorch's and CUDA's are RuntimeErrors
        return f"the plans do not run on this machine's GPU: {error}; 'adatsq-trt doctor --gpu --bundle' says more"

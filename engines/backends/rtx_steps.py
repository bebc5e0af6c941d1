"""A bundle's plans on a GPU: every layout, one activation buffer, one runtime cache.

No machine of ours has run this yet; what can be tested without a GPU (choosing the plans, refusing what does not fit)
is tested.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.rtx import RtxBackend, make_logger
from adatsq_trt.engines.bundle import PLAN_FOLDER, REBUILD, BundleFiles, Manifest, PlanFile
from adatsq_trt.engines.store import STORE_NAME
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError, MismatchError, OutputError
from adatsq_trt.files import write_bytes
from adatsq_trt.formats import TARGETS

if TYPE_CHECKING:
    import tensorrt_rtx as trt
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
    import torch

    if not torch.cuda.is_available():
        raise DependencyError(
            "plans run on a GPU only and PyTorch sees none; run them where a GPU, its driver and a CUDA build of "
            "PyTorch are, or use backend 'onnxruntime'"
        )
    major, minor = torch.cuda.get_device_capability()
    return runnable_plans(manifest, backend.version(), 10 * major + minor)


class RtxSteps(StepRunner):
    """A bundle's engines, of which each step runs one."""

    def __init__(self, files: BundleFiles) -> None:
        """Deserialize the plans for this machine's GPU.

        Raises:
            UserError: as `plans_here`; TensorRT-RTX refuses a plan.
        """
        plans = plans_here(files.manifest)
        import tensorrt_rtx as trt
        import torch

        self._files = files
        self._runtime = trt.Runtime(make_logger())
        self._engines = {plan.assignment: self._deserialize(files.folder / plan.path) for plan in plans}
        sizes = [engine.device_memory_size_v2 for engine in self._engines.values()]
        # One step runs at a time, so all engines write their activations to the same place.
        self._activations = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
        self._cache_file = files.folder.parent / CACHE_FOLDER / f"{plans[0].target}.bin"
        self._cache: trt.IRuntimeCache | None = None
        self._contexts = {assignment: self._context(engine) for assignment, engine in self._engines.items()}
        shared = files.manifest.layout == "shared"
        self._weights = load_store(files.file(f"{PLAN_FOLDER}/{STORE_NAME}")) if shared else {}
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def _deserialize(self, path: Path) -> trt.ICudaEngine:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise DamagedFileError(f"TensorRT-RTX cannot load '{path}'; build it again on this version")
        return engine

    def _context(self, engine: trt.ICudaEngine) -> trt.IExecutionContext:
        """A context over the common activation buffer and the common cache of compiled kernels."""
        import tensorrt_rtx as trt

        config = engine.create_runtime_config()
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_file.is_file() and not self._cache.deserialize(self._cache_file.read_bytes()):
                log.warning("'%s' is of another driver, GPU or version; compiling kernels anew", self._cache_file)
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = engine.create_execution_context(config)
        context.set_device_memory(self._activations.data_ptr(), self._activations.numel())
        return context

    def run(self, step: int, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Bind a step's inputs, scales and weights to its engine and run it."""
        import torch

        assignment = self._files.policy.step_assignments[step]
        held = assignment if assignment in self._engines else None
        engine, context = self._engines[held], self._contexts[held]
        values = {**inputs, **self._files.scales(step), "bucket": np.asarray(assignment, np.int32)}
        output = None
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            if name in self._weights:
                address = self._weights[name].data_ptr()
            else:
                # A scale that no chosen branch reads is bound too, to whatever an earlier step left there.
                given = values.get(name)
                shape = tuple(context.get_tensor_shape(name)) if given is None else given.shape
                buffer = self._buffer(name, shape, engine)
                if given is not None:
                    buffer.copy_(torch.from_numpy(np.asarray(given, order="C")))
                    context.set_input_shape(name, given.shape)
                elif len(shape):
                    output = buffer
                address = buffer.data_ptr()
            context.set_tensor_address(name, address)
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream) or output is None:
            raise AdatsqError(f"TensorRT-RTX failed to run step {step} with inputs {sorted(inputs)}; see --debug")
        stream.synchronize()
        return np.asarray(output.float().cpu().numpy())

    def _buffer(self, name: str, shape: tuple[int, ...], engine: trt.ICudaEngine) -> torch.Tensor:
        """Device memory of an input or output, the same at every step: captured CUDA graphs keep its address."""
        import tensorrt_rtx as trt
        import torch

        types = {
            trt.float32: torch.float32,
            trt.bfloat16: torch.bfloat16,
            trt.float16: torch.float16,
            trt.int32: torch.int32,
        }
        if (name, shape) not in self._buffers:
            dtype = types[engine.get_tensor_dtype(name)]
            self._buffers[name, shape] = torch.ones(shape, dtype=dtype, device="cuda")
        return self._buffers[name, shape]

    def close(self) -> None:
        """Keep what was compiled for the next time and free the engines."""
        if self._cache is not None:
            try:
                write_bytes(self._cache_file, bytes(self._cache.serialize()))
            except OutputError as error:
                log.warning("%s; kernels will be compiled again the next time", error)
        self._contexts.clear()
        self._engines.clear()
        self._buffers.clear()


def load_store(path: Path, device: str = "cuda") -> dict[str, torch.Tensor]:
    """The store in device memory, as one block that keeps the file's alignment.

    Returns:
        Name → its bytes, uint8.

    Raises:
        DamagedFileError: truncated or not safetensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass  # the library has held the header to the file: what it says can be relied upon
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"'{path}' is not a complete safetensors file ({error}); {REBUILD}") from error

    content = np.memmap(path, np.uint8, "c")  # PyTorch warns of arrays that it cannot write to
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    block = torch.empty(len(content) - start, dtype=torch.uint8, device=device)
    block.copy_(torch.from_numpy(np.asarray(content[start:])))
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: block[begin:end] for name, (begin, end) in places.items()}

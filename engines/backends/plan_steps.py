"""A bundle's plans on a GPU: every layout, one buffer of activations.

No machine of ours has run this yet; what can be tested without a GPU (choosing the plans, refusing what does not fit)
is tested.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.bundle import PLAN_FOLDER, REBUILD, BundleFiles, PlanFile
from adatsq_trt.engines.store import STORE_NAME, read_plan
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def gpu_capability() -> int:
    """Compute capability of this machine's GPU, such as 120.

    Raises:
        DependencyError: PyTorch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise DependencyError(
            "plans run on a GPU only and PyTorch sees none; run them where a GPU, its driver and a CUDA build of "
            "PyTorch are, or use backend 'onnxruntime'"
        )
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class PlanSteps(StepRunner):
    """A bundle's engines, of which each step runs one."""

    def __init__(self, files: BundleFiles, plans: tuple[PlanFile, ...], backend: NetworkCompiler) -> None:
        """Deserialize plans.

        Args:
            files: the bundle.
            plans: those for this machine's GPU.
            backend: what compiled them.

        Raises:
            DamagedFileError: the library refuses a plan.
        """
        import torch

        self._files, self._title, self._library = files, backend.title, backend.library
        self._runtime = self._library.Runtime(backend.make_logger())
        self._prepare_runtime(self._runtime)
        self._plans = {plan.assignment: plan for plan in plans}
        self._engines = {plan.assignment: self._deserialize(plan) for plan in plans}
        sizes = [engine.device_memory_size_v2 for engine in self._engines.values()]
        # One step runs at a time, so all engines write their activations to the same place.
        self._activations = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
        self._contexts = {assignment: self._context(engine) for assignment, engine in self._engines.items()}
        shared = files.manifest.layout == "shared"
        self._weights = load_store(files.file(f"{PLAN_FOLDER}/{STORE_NAME}")) if shared else {}
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def _prepare_runtime(self, runtime: Any) -> None:
        """What the library asks for before it deserializes."""

    @abstractmethod
    def _make_context(self, engine: Any) -> Any:
        """An execution context whose device memory is given to it."""

    def _deserialize(self, plan: PlanFile) -> Any:
        folder = self._files.folder
        engine = self._runtime.deserialize_cuda_engine(read_plan(folder, plan))
        if engine is None:
            raise DamagedFileError(f"{self._title} cannot load '{folder / plan.path}'; build it again on this version")
        return engine

    def _context(self, engine: Any) -> Any:
        context = self._make_context(engine)
        context.set_device_memory(self._activations.data_ptr(), self._activations.numel())
        return context

    def run(self, step: int, inputs: Mapping[str, np.ndarray], size: tuple[int, ...] | None = None) -> np.ndarray:
        """Bind a step's inputs, scales and weights to its engine and run it."""
        import torch

        assignment = self._files.policy.step_assignments[step]
        held = assignment if assignment in self._engines else None
        engine, context, stream = self._engines[held], self._contexts[held], torch.cuda.current_stream()
        files = self._files
        profiles = files.manifest.profiles_of(files.manifest.shape(size))
        profile = self._plans[held].profile(len(next(iter(inputs.values()))), profiles)
        if context.active_optimization_profile != profile:
            context.set_optimization_profile_async(profile, stream.cuda_stream)
        bucket = {"bucket": np.asarray(assignment, np.int32)}
        values = {**inputs, **files.positions(files.cpu_graph(step), size), **files.scales(step), **bucket}
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
        if not context.execute_async_v3(stream.cuda_stream) or output is None:
            raise AdatsqError(f"{self._title} failed to run step {step} with inputs {sorted(inputs)}; see --debug")
        stream.synchronize()
        return np.asarray(output.float().cpu().numpy())

    def _buffer(self, name: str, shape: tuple[int, ...], engine: Any) -> torch.Tensor:
        """Device memory of an input or output, the same at every step: captured CUDA graphs keep its address."""
        import torch

        types = {
            self._library.float32: torch.float32,
            self._library.bfloat16: torch.bfloat16,
            self._library.float16: torch.float16,
            self._library.int32: torch.int32,
        }
        if (name, shape) not in self._buffers:
            dtype = types[engine.get_tensor_dtype(name)]
            self._buffers[name, shape] = torch.ones(shape, dtype=dtype, device="cuda")
        return self._buffers[name, shape]

    def close(self) -> None:
        """Free the engines."""
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

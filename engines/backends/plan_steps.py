"""A bundle's plans on a GPU: every layout, one block of activations.

What is bound, and how often (docs/decisions/0041): weights and slots for LoRAs once per context; positions once per
size; scales of all steps lie in one tensor, of which a step binds its part; conditioning once per generation; latents
and time per step.

No machine of ours has run this with a GPU. The tests run it against a stand-in that computes on the bound addresses.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.engines.backends.device_steps import Device, DeviceSteps, RowBuffers, Size
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.backends.plan_controls import PlanControls
from adatsq_trt.engines.bundle import BundleFiles, PlanFile
from adatsq_trt.engines.plan_weights import read_plan
from adatsq_trt.errors import DamagedFileError

if TYPE_CHECKING:
    import torch


class PlanSteps(DeviceSteps):
    """A bundle's engines, of which each step runs one."""

    _marked: tuple[str, ...] = ()

    def __init__(
        self,
        files: BundleFiles,
        plans: tuple[PlanFile, ...],
        backend: NetworkCompiler,
        device: Device | None = None,
        offload: bool = False,
    ) -> None:
        """Deserialize plans.

        Args:
            files: the bundle.
            plans: those for this machine's GPU.
            backend: compiler of the plans.
            device: the GPU.
            offload: of two transformers, hold the one whose steps are running alone.

        Raises:
            DamagedFileError: the library refuses a plan.
            AdatsqError: the library refuses to make an execution context.
        """
        super().__init__(files, device)
        self._title, self._library = backend.title, backend.library
        self._runtime = self._library.Runtime(backend.make_logger())
        self._prepare_runtime(self._runtime)
        self._plans = {plan.assignment: plan for plan in plans}
        self._offload = offload
        self._resident: tuple[str, ...] = ()
        self._contexts: dict[int | None, EngineContext] = {}
        self._activations: torch.Tensor | None = None
        with self._gpu.work():
            self._controls = PlanControls(files, self._gpu)
        self._load(0)

    def _load(self, step: int) -> None:
        """Have the engines of all steps there; or, with offloading, those of the step's transformer and no others."""
        wanted = (self._files.expert(step),) if self._offload else self._files.experts
        if self._resident == wanted:
            return
        self._unload()
        plans = [plan for held, plan in self._plans.items() if not self._offload or self._expert(held) in wanted]
        with self._gpu.work():
            engines = {plan.assignment: self._deserialize(plan) for plan in plans}
            self._contexts = {held: self._context(engine, held) for held, engine in engines.items()}
            # One step runs at a time, so all engines write their activations to the same place.
            self._activations = self._shared_activations()
            contexts = list(self._contexts.values())
            self._controls.load_weights(contexts if self._offload else None)
            for context in contexts:
                self._controls.bind_weights(context)
        self._resident = wanted

    def _unload(self) -> None:
        """Give the engines and their weights back, once what was enqueued is done with them."""
        if self._contexts:
            self._gpu.synchronize()
        self._resident, self._activations = (), None
        self._contexts.clear()
        self._controls.drop_weights()

    def _expert(self, assignment: int | None) -> str:
        """The transformer of an assignment, which is of one."""
        steps = self._files.policy.step_assignments
        return "" if assignment is None else self._files.expert(steps.index(assignment))

    def row_type(self, name: str) -> torch.dtype:
        """Of the engines' input; the same for all."""
        with self._lock:
            if not self._contexts:  # a library refused the plans of the other transformer
                self._load(0)
            return next(iter(self._contexts.values())).dtype(name)

    def set_loras(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Copy other matrices to where the engines read them, in order with the steps."""
        with self._lock, self._gpu.work():
            self.require_open()
            self._controls.set_loras(matrices)

    def _prepare_runtime(self, runtime: Any) -> None:
        """Prepare the library's runtime before it deserializes plans; nothing by default."""

    @abstractmethod
    def _make_context(self, engine: Any, captured: bool) -> Any:
        """An execution context whose device memory is given to it; None where the library refuses.

        Args:
            engine: deserialized.
            captured: whether its calls may be captured as CUDA graphs.
        """

    def _captured(self, held: int | None) -> bool:
        """Whether calls of an engine may be captured as CUDA graphs."""
        # The branch that a plan of all assignments takes is decided on the device, which no captured graph can.
        return held is not None

    def _bind_marked(self, context: EngineContext) -> None:
        """Bind values inside of an engine that are outputs too; there are none by default."""

    def _called(self, held: int | None, rows: int, size: Size, seconds: float) -> None:
        """An engine has been called for so many rows of a size, which took so long to enqueue."""

    def _deserialize(self, plan: PlanFile) -> Any:
        engine = self._runtime.deserialize_cuda_engine(self._read(plan))
        if engine is None:
            path = self._files.folder / plan.path
            raise DamagedFileError(f"{self._title} cannot load '{path}'; build it again on this version")
        return engine

    def _read(self, plan: PlanFile) -> bytes:
        return read_plan(self._files.folder, plan)

    def _context(self, engine: Any, held: int | None) -> EngineContext:
        context = self._make_context(engine, self._captured(held))
        title = f"{self._title} ('{self._plans[held].path}')"
        return EngineContext(self._library, engine, context, title, self._marked)

    def _shared_activations(self) -> torch.Tensor:
        """Only now do the engines know how much they need: budgets for streamed weights are set with the contexts."""
        import torch

        needed = max(context.engine.device_memory_size_v2 for context in self._contexts.values())
        memory = self._gpu.empty((max(needed, 1),), torch.uint8)
        for context in self._contexts.values():
            context.use_memory(memory)
        return memory

    def _held(self, step: int) -> int | None:
        """The assignment of a step's engine; None for the engine of all assignments."""
        assignment = self._files.policy.step_assignments[step]
        return assignment if assignment in self._contexts else None

    def enqueue(self, step: int, buffers: RowBuffers) -> torch.Tensor:
        """Bind a step's tensors to its engine and enqueue it."""
        files, size, stream = self._files, buffers.size, self._gpu.stream
        profiles = files.manifest.profiles_of(files.manifest.shape(size), files.policy.step_assignments[step])
        with self._lock:
            self.require_open()
            self._load(step)
            held = self._held(step)
            context = self._contexts[held]
            context.use_profile(self._plans[held].profile(buffers.count, profiles), stream)
            for name, tensor in buffers.rows.items():
                context.set_shape(name, tensor.shape)
                context.bind(name, tensor.data_ptr())
            self._controls.bind_step(context, step, size)
            output = buffers.output(context.output_shape(), context.dtype(context.output))
            context.bind(context.output, output.data_ptr())
            self._bind_marked(context)
            began = time.perf_counter()
            context.enqueue(stream)
            self._called(held, buffers.count, size, time.perf_counter() - began)
        return output

    def _free(self) -> None:
        """Free the engines."""
        try:
            super()._free()
        finally:
            self._contexts.clear()
            self._controls.clear()
            self._activations = None

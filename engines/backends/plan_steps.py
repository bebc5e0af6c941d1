"""A bundle's plans on a GPU: every layout, one block of activations, tensors that stay on the device.

What is bound, and how often (docs/decisions/0041): weights once per context; positions once per size; scales of all
steps lie in one tensor, of which a step binds its part; conditioning once per generation; latents and time per step.

No machine of ours has run this with a GPU. The tests run it against a stand-in that computes on the bound addresses.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.cuda_device import CudaDevice
from adatsq_trt.engines.backends.execution_context import EngineContext
from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.backends.plan_controls import PlanControls
from adatsq_trt.engines.bundle import BundleFiles, PlanFile
from adatsq_trt.engines.generation import Array, Arrays, DenoisingRequest, Generation
from adatsq_trt.engines.plan_weights import read_plan
from adatsq_trt.errors import DamagedFileError

if TYPE_CHECKING:
    import torch

Size = tuple[int, ...] | None


class Device(Protocol):
    """What `CudaDevice` is to the runtime."""

    @property
    def device(self) -> torch.device:
        """As PyTorch calls it."""

    @property
    def stream(self) -> int:
        """Handle of the stream that everything runs on."""

    def work(self) -> AbstractContextManager[None]:
        """Enqueue on the stream, in order with the caller's."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""


class PlanSteps(StepRunner):
    """A bundle's engines, of which each step runs one. Calls of several threads take turns."""

    def __init__(
        self, files: BundleFiles, plans: tuple[PlanFile, ...], backend: NetworkCompiler, device: Device | None = None
    ) -> None:
        """Deserialize plans.

        Args:
            files: the bundle.
            plans: those for this machine's GPU.
            backend: what compiled them.
            device: the GPU.

        Raises:
            DamagedFileError: the library refuses a plan.
            AdatsqError: the library refuses to make an execution context.
        """
        self._files, self._title, self._library = files, backend.title, backend.library
        self._gpu = device or CudaDevice()
        self._lock = RLock()
        self._runtime = self._library.Runtime(backend.make_logger())
        self._prepare_runtime(self._runtime)
        self._plans = {plan.assignment: plan for plan in plans}
        with self._gpu.work():
            engines = {plan.assignment: self._deserialize(plan) for plan in plans}
            self._contexts = {held: self._context(engine, held) for held, engine in engines.items()}
            # One step runs at a time, so all engines write their activations to the same place.
            self._activations = self._shared_activations()
            self._controls = PlanControls(files, self._gpu, next(iter(self._contexts.values())))
            for context in self._contexts.values():
                self._controls.bind_weights(context)
        self._call: _RowBuffers | None = None

    @property
    def device(self) -> torch.device:
        """Where latents and velocities are."""
        return self._gpu.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that the graphs take their latents in."""
        context = next(iter(self._contexts.values()))
        return context.dtype(self._files.graph("cpu", None).inputs[0].name)

    def _prepare_runtime(self, runtime: Any) -> None:
        """What the library asks for before it deserializes."""

    @abstractmethod
    def _make_context(self, engine: Any, captured: bool) -> Any:
        """An execution context whose device memory is given to it; None where the library refuses.

        Args:
            engine: deserialized.
            captured: whether its calls may be captured as CUDA graphs.
        """

    def _called(self, held: int | None, rows: int, size: Size) -> None:
        """An engine has been called for so many rows of a size."""

    def _deserialize(self, plan: PlanFile) -> Any:
        folder = self._files.folder
        engine = self._runtime.deserialize_cuda_engine(read_plan(folder, plan))
        if engine is None:
            raise DamagedFileError(f"{self._title} cannot load '{folder / plan.path}'; build it again on this version")
        return engine

    def _context(self, engine: Any, held: int | None) -> EngineContext:
        # The branch that a plan of all assignments takes is decided on the device, which no captured graph can.
        context = self._make_context(engine, captured=held is not None)
        title = f"{self._title} ('{self._plans[held].path}')"
        return EngineContext(self._library, engine, context, title)

    def _shared_activations(self) -> torch.Tensor:
        """Only now do the engines know how much they need: budgets for streamed weights are set with the contexts."""
        import torch

        needed = max(context.engine.device_memory_size_v2 for context in self._contexts.values())
        memory = self._gpu.empty((max(needed, 1),), torch.uint8)
        for context in self._contexts.values():
            context.use_memory(memory)
        return memory

    # ------------------------------------------------------------------------------------------------- running

    def run(self, step: int, inputs: Arrays, size: Size = None) -> Array:
        """Predict a velocity from inputs of the caller's, of which NumPy's arrays come back as such."""
        given = next(iter(inputs.values()))
        with self._lock, self._gpu.work():
            if self._call is None or not self._call.fits(len(given), size):
                self._call = _RowBuffers(self, len(given), size)
            for name, value in inputs.items():
                self._call.rows[name].copy_(_tensor(value))
            velocity = self.enqueue(step, self._call).float()
            if isinstance(given, np.ndarray):
                return np.asarray(velocity.cpu().numpy())
            return velocity

    def generation(self, request: DenoisingRequest) -> PlanGeneration:
        """Begin a run of the loop with buffers of its own."""
        with self._lock, self._gpu.work():
            return PlanGeneration(self, request)

    def working(self) -> AbstractContextManager[None]:
        """Keep what PyTorch does meanwhile in order with the engines."""
        return self._gpu.work()

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong there."""
        self._gpu.synchronize()

    def context_of(self, step: int) -> EngineContext:
        """The context that runs a step."""
        return self._contexts[self._held(step)]

    def _held(self, step: int) -> int | None:
        """The assignment of a step's engine; None for the engine of all assignments."""
        assignment = self._files.policy.step_assignments[step]
        return assignment if assignment in self._contexts else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""
        return self._gpu.empty(shape, dtype)

    def row_shapes(self, rows: int, size: Size) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs with rows."""
        return {s.name: (rows, *map(int, s.shape[1:])) for s in self._files.row_inputs(size)}

    def enqueue(self, step: int, buffers: _RowBuffers) -> torch.Tensor:
        """Bind a step's tensors to its engine and enqueue it.

        Args:
            step: index in the loop.
            buffers: inputs with rows, filled.

        Returns:
            The output buffer, [rows, *latent_shape] in the graph's type, which the next step overwrites.
        """
        held, stream = self._held(step), self._gpu.stream
        files, size, context = self._files, buffers.size, self._contexts[held]
        profiles = files.manifest.profiles_of(files.manifest.shape(size))
        with self._lock:
            context.use_profile(self._plans[held].profile(buffers.count, profiles), stream)
            for name, tensor in buffers.rows.items():
                context.set_shape(name, tensor.shape)
                context.bind(name, tensor.data_ptr())
            self._controls.bind_step(context, step, size)
            output = buffers.output(context)
            context.bind(context.output, output.data_ptr())
            context.enqueue(stream)
            self._called(held, buffers.count, size)
        return output

    def close(self) -> None:
        """Free the engines."""
        self._call = None
        self._contexts.clear()
        self._controls.clear()


class _RowBuffers:
    """Inputs with rows, and the output, on the device, in the graph's types.

    Attributes:
        rows: input name → [rows, ...].
        count: rows.
        size: in pixels.
    """

    def __init__(self, runner: PlanSteps, count: int, size: Size) -> None:
        self.count, self.size, self._runner = count, size, runner
        context = runner.context_of(0)
        shapes = runner.row_shapes(count, size)
        self.rows = {name: runner.empty(shape, context.dtype(name)) for name, shape in shapes.items()}
        self._output: torch.Tensor | None = None

    def fits(self, count: int, size: Size) -> bool:
        """Whether these buffers serve another call."""
        return (self.count, self.size) == (count, size)

    def output(self, context: EngineContext) -> torch.Tensor:
        """The output's buffer, once a context knows all shapes."""
        if self._output is None:
            self._output = self._runner.empty(context.output_shape(), context.dtype(context.output))
        return self._output


class PlanGeneration(Generation):
    """A run of the loop on the device: between two steps nothing leaves it, and nothing waits for it."""

    def __init__(self, runner: PlanSteps, request: DenoisingRequest) -> None:
        """Bring the conditioning to the device."""
        super().__init__(request)
        self._runner = runner
        self._buffers = _RowBuffers(runner, request.rows, request.size)
        samples = len(request.latents)
        for name, value in request.conditioning.conditional.items():
            self._buffers.rows[name][:samples].copy_(_tensor(value))
        for name, value in (request.conditioning.unconditional or {}).items():
            self._buffers.rows[name][samples:].copy_(_tensor(value))

    def first_latents(self) -> torch.Tensor:
        """On the device."""
        import torch

        given = self.request.latents
        return self._runner.empty(tuple(given.shape), torch.float32).copy_(_tensor(given))

    def predict(self, latents: Array, step: int) -> torch.Tensor:
        """Enqueue the model."""
        request, rows = self.request, self._buffers.rows
        samples = len(latents)
        for branch in range(request.conditioning.branches):
            rows[request.latent_input][branch * samples : (branch + 1) * samples].copy_(_tensor(latents))
        for name, value in request.row_values(step).items():
            rows[name].fill_(value)
        return self._runner.enqueue(step, self._buffers).float()


def _tensor(value: Array) -> torch.Tensor:
    """A caller's array or tensor as a tensor, where it is."""
    import torch

    return torch.from_numpy(np.asarray(value, order="C")) if isinstance(value, np.ndarray) else value

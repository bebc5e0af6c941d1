"""The denoiser on a device: tensors that stay there, and one loop for all libraries that compute there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import RLock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.cuda_device import CudaDevice
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.generation import Array, Arrays, DenoisingLoop, DenoisingRequest

if TYPE_CHECKING:
    import torch

Size = tuple[int, ...] | None


class Device(Protocol):
    """Interface of a device to the runtime, as `CudaDevice` fills it."""

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

    def timed(self, enqueue: Callable[[], object]) -> float:
        """Milliseconds that the stream takes for what is enqueued."""

    def used_bytes(self) -> int:
        """Memory there that is in use."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""


class DeviceSteps(StepRunner):
    """Runs a bundle's steps on a device. Calls of several threads run one after another."""

    def __init__(self, files: BundleFiles, device: Device | None = None) -> None:
        """Take the device.

        Args:
            files: the bundle.
            device: the GPU unless given.
        """
        super().__init__(files)
        self._gpu = device or CudaDevice()
        self._lock = RLock()
        self._call: RowBuffers | None = None

    @property
    def device(self) -> torch.device:
        """Where latents and velocities are."""
        return self._gpu.device

    @abstractmethod
    def row_type(self, name: str) -> torch.dtype:
        """Type in which the graphs take an input with rows."""

    @abstractmethod
    def enqueue(self, step: int, buffers: RowBuffers) -> torch.Tensor:
        """Enqueue a step.

        Args:
            step: index in the loop.
            buffers: inputs with rows, filled.

        Returns:
            The output buffer, [rows, *latent_shape] in the graph's type, which the next step overwrites.

        Raises:
            UserError: as `require_open`.
        """

    def run(self, step: int, inputs: Arrays, size: Size = None) -> Array:
        """Predict a velocity from inputs of the caller's, of which NumPy's arrays come back as such."""
        import torch

        given = next(iter(inputs.values()))
        with self._lock, self._gpu.work():
            self.require_open()
            if self._call is None or not self._call.fits(len(given), size):
                self._call = RowBuffers(self, len(given), size)
            for name, value in inputs.items():
                self._call.rows[name].copy_(_tensor(value))
            # A copy also of float32: the next call overwrites the buffer.
            velocity = self.enqueue(step, self._call).to(torch.float32, copy=True)
            if isinstance(given, np.ndarray):
                return np.asarray(velocity.cpu().numpy())
            return velocity

    def loop(self, request: DenoisingRequest) -> DeviceLoop:
        """Begin a run of the loop with buffers of its own."""
        with self._lock, self._gpu.work():
            self.require_open()
            return DeviceLoop(self, request)

    def working(self) -> AbstractContextManager[None]:
        """Keep what PyTorch does meanwhile in order with the steps."""
        return self._gpu.work()

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong there."""
        self._gpu.synchronize()

    def timed(self, loop: DenoisingLoop, latents: Array, step: int) -> float:
        """Milliseconds of one call of the model on the device."""
        return self._gpu.timed(lambda: loop.predict(latents, step))

    def timed_step(self, step: int, buffers: RowBuffers) -> float:
        """Milliseconds of one step's graph or plan alone, with inputs that are there."""
        return self._gpu.timed(lambda: self.enqueue(step, buffers))

    def used_bytes(self) -> int:
        """Memory of the device that is in use, by whatever process."""
        return self._gpu.used_bytes()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""
        return self._gpu.empty(shape, dtype)

    def row_shapes(self, rows: int, size: Size) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs with rows."""
        return {s.name: (rows, *map(int, s.shape[1:])) for s in self._files.row_inputs(size)}

    def _free(self) -> None:
        """Wait for what was enqueued, as by a loop that was left in the middle: it uses this memory."""
        with self._lock:
            try:
                self._gpu.synchronize()
            finally:
                self._call = None


class RowBuffers:
    """Inputs with rows, and the output, on the device, in the graph's types.

    Attributes:
        rows: input name → [rows, ...].
        count: rows.
        size: in pixels.
    """

    def __init__(self, runner: DeviceSteps, count: int, size: Size) -> None:
        self.count, self.size, self._runner = count, size, runner
        shapes = runner.row_shapes(count, size)
        self.rows = {name: runner.empty(shape, runner.row_type(name)) for name, shape in shapes.items()}
        self._output: torch.Tensor | None = None

    def fits(self, count: int, size: Size) -> bool:
        """Whether these buffers serve another call."""
        return (self.count, self.size) == (count, size)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The output's buffer; the same for all steps."""
        if self._output is None:
            self._output = self._runner.empty(shape, dtype)
        return self._output


class DeviceLoop(DenoisingLoop):
    """A run of the loop on the device: between two steps nothing leaves it, and nothing waits for it."""

    def __init__(self, runner: DeviceSteps, request: DenoisingRequest) -> None:
        """Bring the conditioning to the device."""
        super().__init__(request)
        self._runner = runner
        self._buffers = RowBuffers(runner, request.rows, request.size)
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

    def inputs(self, latents: Array, step: int) -> dict[str, torch.Tensor]:
        """On the device, in the graphs' types: the buffers of this run."""
        request, rows = self.request, self._buffers.rows
        samples = len(latents)
        for branch in range(request.conditioning.branches):
            rows[request.latent_input][branch * samples : (branch + 1) * samples].copy_(_tensor(latents))
        for name, value in request.row_values(step).items():
            rows[name].fill_(value)
        return rows

    def predict(self, latents: Array, step: int) -> torch.Tensor:
        """Enqueue the model."""
        self.inputs(latents, step)
        return self._runner.enqueue(step, self._buffers).float()


def _tensor(value: Array) -> torch.Tensor:
    """A caller's array or tensor as a tensor, where it is."""
    import torch

    return torch.from_numpy(np.asarray(value, order="C")) if isinstance(value, np.ndarray) else value

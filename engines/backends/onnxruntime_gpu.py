"""A bundle's `cpu` graphs on a GPU with ONNX Runtime, bound to the addresses of tensors that stay there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from adatsq_trt.engines.backends.device_steps import Device, DeviceSteps, RowBuffers, Size
from adatsq_trt.engines.backends.onnxruntime import CUDA_PROVIDER, PROVIDER, OnnxRuntimeBackend, load_session
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError
from adatsq_trt.graph_index import GraphFile

if TYPE_CHECKING:
    import torch

_Controls: TypeAlias = "dict[str, torch.Tensor | np.ndarray]"


class OnnxRuntimeGpuSteps(DeviceSteps):
    """One session for all steps of a bundle, on the stream of the loop.

    Operators that the provider does not have run on the processor; ONNX Runtime then waits by itself.

    Attributes:
        memory: ONNX Runtime's name of the memory that addresses are of.
    """

    memory: ClassVar[str] = "cuda"

    def __init__(self, files: BundleFiles, graph: GraphFile, device: Device | None = None) -> None:
        """Load a graph.

        Args:
            files: the bundle.
            graph: the one of all assignments, or the reference.
            device: the GPU unless given.

        Raises:
            DamagedFileError: ONNX Runtime cannot load it.
        """
        super().__init__(files, device)
        import onnxruntime

        OnnxRuntimeBackend().require()
        self._graph, self._path = graph, files.graph_path(graph)
        self._session = load_session(self._path, self.providers())
        self._options = onnxruntime.RunOptions()
        # The loop waits once, at its end.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._controls: dict[Size, list[_Controls]] = {}
        self._loras: dict[str, torch.Tensor] = {}

    def set_loras(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Bring other matrices to the device; those that a step may still read stay until it is done."""
        with self._lock, self._gpu.work():
            self.require_open()
            there = {name: self._there(value) for name, value in matrices.items()}
            self._gpu.synchronize()
            self._loras = there

    def providers(self) -> list[Any]:
        """The GPU's provider on the loop's stream, then the processor's."""
        return [(CUDA_PROVIDER, {"user_compute_stream": str(self._gpu.stream)}), PROVIDER]

    def row_type(self, name: str) -> torch.dtype:
        """The graphs compute in float32."""
        import torch

        return torch.float32

    def enqueue(self, step: int, buffers: RowBuffers) -> torch.Tensor:
        """Bind a step's tensors to the session and run it."""
        with self._lock:
            self.require_open()
            binding = self._session.io_binding()
            controls = {**self._controls_of(step, buffers.size), **self._loras}
            for name, value in {**buffers.rows, **controls}.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, value)
                else:
                    self._bind(binding.bind_input, name, value)
            latent = self._files.manifest.shape(buffers.size).latent_shape
            output = buffers.output((buffers.count, *latent), self.row_type(""))
            self._bind(binding.bind_output, self._graph.outputs[0].name, output)
            # The library documents no common base for its exceptions.
            try:
                self._session.run_with_iobinding(binding, self._options)
            except Exception as error:
                raise AdatsqError(f"ONNX Runtime cannot run '{self._path}': {error}; run 'adatsq-trt check'") from error
        return output

    def _bind(self, bind: Any, name: str, tensor: torch.Tensor) -> None:
        bind(name, self.memory, 0, np.float32, list(tensor.shape), tensor.data_ptr())

    def _controls_of(self, step: int, size: Size) -> _Controls:
        """Place the controls of all steps: scales and positions on the device, inputs of branches on the processor."""
        if size not in self._controls:
            steps = range(self._files.policy.steps)
            controls = [self._files.controls(self._graph, step, size) for step in steps]
            # Positions are the same arrays at every step.
            there = {id(v): self._there(v) for own in controls for v in own.values() if v.dtype == np.float32}
            self._controls[size] = [{name: there.get(id(v), v) for name, v in own.items()} for own in controls]
        return self._controls[size][step]

    def _there(self, value: np.ndarray) -> torch.Tensor:
        import torch

        return self.empty(value.shape, torch.float32).copy_(torch.from_numpy(value))

    def _free(self) -> None:
        """Free the session."""
        try:
            super()._free()
        finally:
            self._controls.clear()
            self._loras.clear()
            del self._session

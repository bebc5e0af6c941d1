"""ONNX Runtime on the CPU: runs `cpu` graphs everywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adatsq_trt.engines.backends.base import Backend, Runner, StepRunner
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError
from adatsq_trt.graph_index import GraphFile

PROVIDER = "CPUExecutionProvider"
# Errors only: the library warns about GPUs that it does not find, which nobody asked for.
_LOG_ERRORS = 3


class OnnxRuntimeRunner(Runner):
    """An ONNX Runtime session."""

    def __init__(self, path: Path) -> None:
        """Load a graph; see `OnnxRuntimeBackend.load`."""
        import onnxruntime

        self._path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        options.use_deterministic_compute = True
        # Without VNNI instructions the fused unsigned-by-signed INT8 product saturates in 16 bit and is plainly wrong.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # The library documents no common base for its exceptions.
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[PROVIDER])
        except Exception as error:
            raise DamagedFileError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load '{path}': {error}; "
                "run 'adatsq-trt build engine' again with the version of onnxruntime that constraints.txt names"
            ) from error
        _return_freed_memory()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs.

        Raises:
            AdatsqError: the graph does not take these inputs, or there is not enough memory; in the library's words.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise AdatsqError(
                f"ONNX Runtime cannot run '{self._path}' with inputs {sorted(inputs)}: {error}; run 'adatsq-trt check'"
            ) from error

    def close(self) -> None:
        """Free the session."""
        del self._session


def _return_freed_memory() -> None:
    """Give back what dequantizing the weights needed at loading, which glibc would keep: two thirds of the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class OnnxRuntimeSteps(StepRunner):
    """One session for all steps of a bundle.

    In the graph of all assignments every weight has one place and one reader, so the session holds it once, packed for
    the processor as in a session of its own (docs/decisions/0009).
    """

    def __init__(self, files: BundleFiles, graph: GraphFile) -> None:
        """Load a graph.

        Args:
            files: the bundle.
            graph: the one of all assignments, or the reference.
        """
        self._files, self._graph = files, graph
        self._runner = OnnxRuntimeBackend().load(files.graph_path(graph))
        self._controls: dict[int, dict[str, np.ndarray]] = {}

    def run(self, step: int, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the session, with its branches and scales set for a step."""
        if step not in self._controls:
            self._controls[step] = self._control(step)
        return self._runner.run({**inputs, **self._controls[step]})[self._graph.outputs[0].name]

    def _control(self, step: int) -> dict[str, np.ndarray]:
        """The inputs that choose a step's branches and scale its activations; scales that no chosen branch reads are 1.

        They are the same for all calls of a step.
        """
        control = {signature.name: np.ones((), np.float32) for signature in self._graph.scale_inputs.values()}
        if control:
            control |= self._files.scales(step)
        if self._graph.bucket_input is not None:
            assignment = self._files.policy.step_assignments[step]
            control[self._graph.bucket_input.name] = np.asarray(assignment, np.int32)
        return control

    def close(self) -> None:
        """Free the session."""
        self._runner.close()


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with its CPU provider; a graph is its own plan."""

    name = "onnxruntime"

    def require(self) -> None:
        """Make sure that the library and its CPU provider are there."""
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(
                "the package 'onnxruntime' is not installed; run: pip install onnxruntime-gpu (it runs on CPUs too)"
            ) from error
        if PROVIDER not in onnxruntime.get_available_providers():
            raise DependencyError(
                f"this ONNX Runtime has no {PROVIDER}, only {', '.join(onnxruntime.get_available_providers())}; "
                "run: pip install onnxruntime-gpu"
            )

    def version(self) -> str:
        """ONNX Runtime's version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def load(self, path: Path) -> Runner:
        """Load an ONNX graph with its external data."""
        self.require()
        return OnnxRuntimeRunner(path)

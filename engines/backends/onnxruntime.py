"""ONNX Runtime on the CPU: runs `cpu` graphs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adatsq_trt.engines.backends.base import Backend, Runner
from adatsq_trt.errors import DamagedFileError, DependencyError

PROVIDER = "CPUExecutionProvider"
# Errors only: the library warns about GPUs that it does not find, which nobody asked for.
_LOG_ERRORS = 3


class OnnxRuntimeRunner(Runner):
    """An ONNX Runtime session."""

    def __init__(self, path: Path) -> None:
        """Load a graph; see `OnnxRuntimeBackend.load`."""
        import onnxruntime

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

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def close(self) -> None:
        """Free the session."""
        del self._session


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

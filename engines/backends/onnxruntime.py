"""ONNX Runtime on the CPU: runs `cpu` graphs everywhere."""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.engines.backends.base import Backend, Runner, StepRunner
from adatsq_trt.engines.backends.cuda_device import gpu_capability
from adatsq_trt.engines.backends.int8 import PRECISE_PRODUCTS, precise_products_needed
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.generation import Array, Arrays, as_array
from adatsq_trt.errors import AdatsqError, DamagedFileError, DependencyError
from adatsq_trt.graph_index import GraphFile

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)
PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
# Errors only: the library warns about GPUs that it does not find, which nobody asked for.
_LOG_ERRORS = 3
# Graphs over larger weight files are folded; loading smaller ones needs little memory anyway.
_FOLDED_BYTES = 1 << 24


class OnnxRuntimeRunner(Runner):
    """An ONNX Runtime session."""

    def __init__(self, path: Path) -> None:
        """Load a graph; see `OnnxRuntimeBackend.load`."""
        self._path, self._session = path, load_session(path)

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


def load_session(path: Path, providers: Sequence[Any] = (PROVIDER,)) -> onnxruntime.InferenceSession:
    """A session that computes a graph.

    Args:
        path: of the graph; external data is found beside it.
        providers: in the order of preference, with their options.

    Raises:
        DamagedFileError: in the library's words.
    """
    import onnxruntime

    # The library documents no common base for its exceptions.
    try:
        on_processor = list(providers) == [PROVIDER]
        session = _folded_session(path) if on_processor else _session(path, providers)
    except Exception as error:
        raise DamagedFileError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load '{path}': {error}; "
            "run 'adatsq-trt build engine' again with the version of onnxruntime that constraints.txt names"
        ) from error
    _return_freed_memory()
    return session


def _folded_session(path: Path) -> onnxruntime.InferenceSession:
    """A session whose constants were computed one by one, where that matters and the disk has room for them."""
    from adatsq_trt.engines.backends.fold import fold, weight_file_bytes

    if weight_file_bytes(path) < _FOLDED_BYTES:
        return _session(path)
    # The session keeps what it has mapped, also when the files have lost their names.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return _session(fold(path, Path(scratch)))
        except OSError as error:
            log.warning("no room for the weights of '%s' in '%s' (%s); loading takes more memory", path, scratch, error)
    return _session(path)


def _session(path: Path, providers: Sequence[Any] = (PROVIDER,)) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.use_deterministic_compute = True
    options.add_session_config_entry(PRECISE_PRODUCTS, str(int(precise_products_needed())))
    # Else a session's threads spin for some 30 ms after a call, and take the processors from the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=list(providers))


def _return_freed_memory() -> None:
    """Give back what dequantizing the weights needed at loading, which glibc would keep: two thirds of the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class OnnxRuntimeSteps(StepRunner):
    """One session for all steps of a bundle, or of one of its experts.

    In the graph of all assignments every weight has one place and one reader, so the session holds it once, packed for
    the processor as in a session of its own (docs/decisions/0009).
    """

    def __init__(self, files: BundleFiles, graph: GraphFile) -> None:
        """Load a graph.

        Args:
            files: the bundle.
            graph: the one of all assignments, or the reference.
        """
        super().__init__(files)
        self._graph = graph
        self._runner = OnnxRuntimeBackend().load(files.graph_path(graph))
        self._controls: dict[tuple[int, tuple[int, ...] | None], dict[str, np.ndarray]] = {}
        self._loras: dict[str, np.ndarray] = {}

    def set_loras(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Give other arrays to the next calls."""
        self.require_open()
        self._loras = dict(matrices)

    def run(self, step: int, inputs: Arrays, size: tuple[int, ...] | None = None) -> np.ndarray:
        """Run the session, with its branches and scales set for a step; they are the same for all calls of a step."""
        self.require_open()
        key = (step, size)
        if key not in self._controls:
            self._controls[key] = self._files.controls(self._graph, step, size)
        arrays = {name: as_array(value) for name, value in inputs.items()}
        return self._runner.run({**arrays, **self._controls[key], **self._loras})[self._graph.outputs[0].name]

    def _free(self) -> None:
        self._runner.close()


class ExpertSteps(StepRunner):
    """A session for each transformer of a bundle of two: both all the time, or one at a time."""

    def __init__(self, files: BundleFiles, make: Callable[[str], StepRunner], offload: bool = False) -> None:
        """Make the runners.

        Args:
            files: the bundle.
            make: the runner of one of `files.experts`.
            offload: make a transformer's runner when its first step comes, once the other's is freed.
        """
        super().__init__(files)
        self._make, self._lock = make, RLock()
        self._experts = {} if offload else {expert: make(expert) for expert in files.experts}

    def run(self, step: int, inputs: Arrays, size: tuple[int, ...] | None = None) -> Array:
        """Run the session of the step's transformer; calls of several threads run one after another."""
        expert = self._files.expert(step)
        with self._lock:
            self.require_open()
            if expert not in self._experts:
                self._free()
                self._experts[expert] = self._make(expert)
            return self._experts[expert].run(step, inputs, size)

    def _free(self) -> None:
        with self._lock:
            while self._experts:
                self._experts.popitem()[1].close()


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with its CPU provider; a graph is its own plan."""

    name = title = "onnxruntime"

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


def require_cuda() -> None:
    """Make sure that ONNX Runtime can use a GPU here: it falls back to the processor without an error.

    Raises:
        DependencyError: says what is missing.
    """
    import onnxruntime

    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise DependencyError(f"this ONNX Runtime has no {CUDA_PROVIDER}; run: pip install onnxruntime-gpu")
    gpu_capability()

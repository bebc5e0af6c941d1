"""A double of the part of TensorRT's and TensorRT-RTX's Python API that runs plans: ONNX Runtime computes.

There is no GPU here, and nothing else executes a plan. A plan is known by its hash; what it computes is the `cpu` graph
beside the `target` graph that the real compiler made it of. Inputs are read from the addresses that were bound, in the
target graph's types, and the output is written to its address.

It is strict where the library is undefined: a missing or freed address, another type or shape than the graph's, a shape
outside the optimization profile, a context on two streams, a call after the memory was taken: all are errors. The
argument types are those of the installed bindings, read from their docstrings.
"""

import ctypes
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as real
import torch

from adatsq_trt.engines.backends.base import BatchRange, Compiler, Profile
from adatsq_trt.engines.bundle import GRAPH_FOLDER, PLAN_FOLDER, BundleFiles, PlanFile
from adatsq_trt.engines.plan_weights import STORE_NAME, name_all_weights, read_plan, without_weights
from adatsq_trt.formats import Target
from adatsq_trt.graph_index import SELECTOR_INPUT
from tests.doubles.host_device import ALIGNMENT, STREAM, HostDevice

_TYPES = {
    onnx.TensorProto.FLOAT: (real.float32, torch.float32),
    onnx.TensorProto.FLOAT16: (real.float16, torch.float16),
    onnx.TensorProto.BFLOAT16: (real.bfloat16, torch.bfloat16),
    onnx.TensorProto.INT32: (real.int32, torch.int32),
}
_OPAQUE = {onnx.TensorProto.FLOAT8E4M3FN: real.fp8, onnx.TensorProto.INT8: real.int8, onnx.TensorProto.INT4: real.int4}
PLUGIN, PLUGIN_LIBRARY = ("AdatsqLinear", "1", "adatsq"), b"a double of the plugin's library"
VERSION = "10.13.2.6"  # of TensorRT, where the double stands for that
MEMORY = 4096  # bytes of activations that every engine asks for


@dataclass(frozen=True)
class Port:
    """An input or output of a target graph.

    Attributes:
        element: ONNX type.
        shape: -1 for a dynamic axis.
        digest: of a weight's bytes; None for the rest.
        size: of a weight, in bytes.
    """

    element: int
    shape: tuple[int, ...]
    digest: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Recipe:
    """What a plan computes.

    Attributes:
        graph: the `cpu` graph.
        inputs: of the target graph.
        output: its name and port.
        profiles: optimization profiles.
        plugins: it has layers of the plugin.
        marked: values inside that are outputs too.
    """

    graph: Path
    inputs: dict[str, Port]
    output: tuple[str, Port]
    profiles: tuple[Profile, ...]
    plugins: bool = False
    marked: dict[str, Port] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, Port]:
        """All of them, the output first."""
        return {self.output[0]: self.output[1], **self.marked}


class PlanBook:
    """Which plan computes what, by the hash of its bytes."""

    def __init__(self) -> None:
        self._recipes: dict[str, Recipe] = {}

    def enter(self, bundle: BundleFiles, plans: Sequence[PlanFile], profiles: Sequence[Profile]) -> None:
        """Note what plans compute, from the graphs that they were built of."""
        folder, layout = bundle.folder / GRAPH_FOLDER, bundle.manifest.layout
        for plan in plans:
            target, cpu = (bundle.graph(variant, plan.assignment) for variant in ("target", "cpu"))
            model = onnx.load(folder / (target.plain_path or target.path), load_external_data=False)
            weights: dict[str, tuple[str, int]] = {}
            if layout == "shared":
                names = name_all_weights(folder, bundle.index)
                model = without_weights(folder / target.path, names)
                data = (folder / bundle.index.weights).read_bytes()
                weights = {n: (_digest(data[w.offset : w.offset + w.length]), w.length) for w, n in names.items()}
            ports = {value.name: _port(value, weights) for value in model.graph.input}
            output = model.graph.output[0]
            digest = _digest(read_plan(bundle.folder, plan))
            own = (output.name, _port(output, {}))
            self._recipes[digest] = Recipe(folder / cpu.path, ports, own, tuple(profiles), layout == "plugin")

    def enter_comparison(self, bundle: BundleFiles, plan: bytes, rows: int, kind: str) -> None:
        """Note that a plan computes the full-precision graph, with inputs and outputs of another type."""
        path = bundle.graph_path(bundle.graph("reference", None))
        model = onnx.load(path, load_external_data=False)
        element = {"float32": onnx.TensorProto.FLOAT, "bfloat16": onnx.TensorProto.BFLOAT16}[kind]
        ports = {value.name: replace(_port(value, {}), element=element) for value in model.graph.input}
        output = model.graph.output[0]
        profiles = BatchRange(1, rows, rows).profiles
        own = (output.name, replace(_port(output, {}), element=element))
        self._recipes[_digest(plan)] = Recipe(path, ports, own, profiles)

    def enter_marked(self, bundle: BundleFiles, plan: bytes, assignment: int, values: Sequence[Any], rows: int) -> None:
        """Note that a plan computes an assignment's graph and gives values inside of it too.

        Args:
            bundle: of the graph.
            plan: its bytes.
            assignment: index into the policy's assignments.
            values: as the target graph declares them.
            rows: of a call.
        """
        target, cpu = (bundle.graph_path(bundle.graph(variant, assignment)) for variant in ("target", "cpu"))
        model = onnx.load(target, load_external_data=False)
        ports, output = {value.name: _port(value, {}) for value in model.graph.input}, model.graph.output[0]
        marked = {value.name: Port(value.type.tensor_type.elem_type, ()) for value in values}
        own, profiles = (output.name, _port(output, {})), BatchRange(1, rows, rows).profiles
        self._recipes[_digest(plan)] = Recipe(cpu, ports, own, profiles, marked=marked)

    def find(self, plan: bytes) -> Recipe | None:
        """What a plan computes; None for bytes that are no plan of ours."""
        return self._recipes.get(_digest(plan))


class CompilerDouble(Compiler):
    """A double of a compiler: its plans say what they were made of, and nothing else.

    It takes what no compiler here does, graphs of plugin nodes, and no time.
    """

    name, settings = "double", ""

    def require(self) -> None:
        pass

    def version(self) -> str:
        return VERSION

    def build(self, onnx_path: Path, target: Target, batch: BatchRange) -> bytes:
        model = onnx.load(onnx_path, load_external_data=False)
        assert not model.functions, "a parser may take local functions for the plugin's nodes"
        for value in model.graph.input:
            shapes = [profile.inputs(value.name, _port(value, {}).shape) for profile in batch.profiles]
            assert value.name != SELECTOR_INPUT or all(len(set(own)) == 1 for own in shapes), "assignments share one"
        made_of = [target.name, _digest(model.SerializeToString(deterministic=True)), repr(batch)]
        return f"a double's plan: {made_of}".encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _port(value: onnx.ValueInfoProto, weights: dict[str, tuple[str, int]]) -> Port:
    kind = value.type.tensor_type
    shape = tuple(-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim)
    return Port(kind.elem_type, shape, *weights.get(value.name, (None, 0)))


# ------------------------------------------------------------------------------- argument types of the real bindings


def checked(interface: str) -> Any:
    """Refuse arguments that the bindings' own method would refuse, with the error that they raise."""

    def decorate(method: Any) -> Any:
        overloads = _overloads(getattr(getattr(real, interface), method.__name__).__doc__ or "")
        assert overloads, f"{interface}.{method.__name__} tells no signature"

        def call(self: Any, *args: Any) -> Any:
            if not any(_accepts(overload, args) for overload in overloads):
                raise TypeError(f"{method.__name__}(): incompatible function arguments, got {args}")
            return method(self, *args)

        return call

    return decorate


def _overloads(doc: str) -> list[list[tuple[str, bool]]]:
    """Type and optionality of each parameter after self, for each signature in a docstring."""
    found = []
    for match in re.finditer(r"\w+\(self: [\w.]+(?:, (?P<rest>[^\n]*))?\) -> ", doc):
        parameters = re.findall(r"\w+: ([\w.:\[\]]+)( = )?", match["rest"] or "")
        found.append([(kind, bool(default)) for kind, default in parameters])
    return found


def _accepts(overload: list[tuple[str, bool]], args: tuple[Any, ...]) -> bool:
    needed = sum(not optional for _, optional in overload)
    return needed <= len(args) <= len(overload) and all(
        _is(kind, value) for (kind, _), value in zip(overload, args, strict=False)
    )


def _is(kind: str, value: Any) -> bool:
    name = re.split(r"[.:]", kind)[-1]
    if name == "SupportsInt":
        return hasattr(value, "__int__") and not isinstance(value, torch.Tensor | np.ndarray)
    if name == "Buffer":
        return isinstance(value, bytes | bytearray | memoryview | np.ndarray)
    if name in ("str", "tuple", "list"):
        return type(value).__name__ == name
    if isinstance(getattr(real, name, None), type) and isinstance(value, getattr(real, name)):
        return True
    return type(value).__name__ == name or (name == "IRuntimeCache" and isinstance(value, RuntimeCache))


# -------------------------------------------------------------------------------------------------------- the double


@dataclass
class Log:
    """What happened to all engines of a library.

    Attributes:
        captured: for each context whether its calls may be captured.
        cached: runtime caches that were read.
        runs: graphs in the order of their runs.
    """

    captured: list[bool] = field(default_factory=list)
    cached: list[bytes] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


class Library:
    """The module; what it does not replace is the real module's."""

    def __init__(self, book: PlanBook, device: HostDevice) -> None:
        self.book, self.device, self.log = book, device, Log()
        self.refuse: set[str] = set()  # names of methods that fail as the library does
        self.loaded: str | None = None  # the plugin's library
        self.streamable_bytes = 0  # of the weights of every engine

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    @property
    def __version__(self) -> str:
        return str(real.__version__)

    def Runtime(self, logger: Any) -> "Runtime":  # noqa: N802 - as the library calls it
        if not isinstance(logger, real.ILogger):
            raise TypeError("Runtime(): incompatible constructor arguments")
        return Runtime(self)


class Runtime:
    def __init__(self, library: Library) -> None:
        self._library = library
        self.engine_host_code_allowed = False
        self._registry = IPluginRegistry(library)

    def get_plugin_registry(self) -> "IPluginRegistry":
        return self._registry

    @checked("Runtime")
    def deserialize_cuda_engine(self, plan: Any) -> "ICudaEngine | None":
        recipe = self._library.book.find(bytes(plan))
        if recipe is None or (recipe.plugins and self._registry.get_creator(*PLUGIN) is None):
            return None
        return ICudaEngine(self._library, recipe)


class IPluginRegistry:
    """Of a runtime; knows the plugin once any runtime of the process has loaded it."""

    def __init__(self, library: Library) -> None:
        self._library = library

    @checked("IPluginRegistry")
    def load_library(self, path: str) -> object:
        """A handle; None where the file is not the plugin's, or its plugin is registered already."""
        if self._library.loaded is not None or not Path(path).is_file() or Path(path).read_bytes() != PLUGIN_LIBRARY:
            return None
        self._library.loaded = path
        return path

    @checked("IPluginRegistry")
    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object:
        return self._library.loaded if (type, version, plugin_namespace) == PLUGIN else None


class RuntimeCache:
    def __init__(self, log: Log) -> None:
        self._log, self._content = log, b"empty"

    @checked("IRuntimeCache")
    def deserialize(self, blob: Any) -> bool:
        self._log.cached.append(bytes(blob))
        return bytes(blob).startswith(b"kernels")

    @checked("IRuntimeCache")
    def serialize(self) -> bytes:
        return b"kernels of %d runs" % len(self._log.runs)


class IRuntimeConfig:
    def __init__(self, library: Library) -> None:
        self._library = library
        self.strategy = real.ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = real.CudaGraphStrategy.DISABLED

    @checked("IRuntimeConfig")
    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._library.log)

    @checked("IRuntimeConfig")
    def set_runtime_cache(self, cache: Any) -> bool:
        return "set_runtime_cache" not in self._library.refuse

    @checked("IRuntimeConfig")
    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class ICudaEngine:
    def __init__(self, library: Library, recipe: Recipe) -> None:
        self.library, self.recipe = library, recipe
        self.streamable_weights_size = library.streamable_bytes
        self.weight_streaming_budget_v2 = 0
        self._names = [*recipe.inputs, *recipe.outputs]
        self.contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.recipe.profiles)

    @property
    def device_memory_size_v2(self) -> int:
        """Streamed weights go through memory of their own, which depends on the budget."""
        if not self.streamable_weights_size:
            return MEMORY
        assert self.weight_streaming_budget_v2, "asked for memory before there is a budget for streamed weights"
        return 2 * MEMORY

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def port(self, name: str) -> Port:
        return {**self.recipe.inputs, **self.recipe.outputs}[name]

    @checked("ICudaEngine")
    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    @checked("ICudaEngine")
    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if name in self.recipe.inputs else real.TensorIOMode.OUTPUT

    @checked("ICudaEngine")
    def get_tensor_dtype(self, name: str) -> Any:
        element = self.port(name).element
        return _TYPES[element][0] if element in _TYPES else _OPAQUE[element]

    @checked("ICudaEngine")
    def get_tensor_location(self, name: str) -> Any:
        return real.TensorLocation.DEVICE

    @checked("ICudaEngine")
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.library)

    @checked("ICudaEngine")
    def create_execution_context(self, setting: Any = real.ExecutionContextAllocationStrategy.STATIC) -> Any:
        if "create_execution_context" in self.library.refuse:
            return None
        strategy = getattr(setting, "strategy", setting)
        graphs = getattr(setting, "cuda_graph_strategy", real.CudaGraphStrategy.DISABLED)
        self.library.log.captured.append(graphs == real.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE)
        self.contexts += 1
        own_memory = strategy != real.ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self, own_memory, first=self.contexts == 1)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, own_memory: bool, first: bool) -> None:
        self.engine, self._own_memory = engine, own_memory
        self.active_optimization_profile = 0 if first else -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._stream: int | None = None

    @property
    def _device(self) -> HostDevice:
        return self.engine.library.device

    @checked("IExecutionContext")
    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0, "activations are not aligned"
        assert size >= self.engine.device_memory_size_v2, f"{size} bytes of activations are too few"
        self._memory = (memory, size)

    @checked("IExecutionContext")
    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if "set_optimization_profile_async" in self.engine.library.refuse:
            return False
        if not 0 <= index < self.engine.num_optimization_profiles:
            return False
        self.active_optimization_profile = index
        self._shapes.clear()
        return True

    @checked("IExecutionContext")
    def set_input_shape(self, name: str, shape: Any) -> bool:
        if "set_input_shape" in self.engine.library.refuse:
            return False
        if name not in self.engine.recipe.inputs or self.active_optimization_profile < 0:
            return False
        declared, shape = self.engine.port(name).shape, tuple(shape)
        if len(declared) != len(shape) or not self._fits(name, declared, shape):
            return False
        self._shapes[name] = shape
        return True

    def _fits(self, name: str, declared: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        if -1 not in declared:
            return declared == shape
        least, _, most = self.engine.recipe.profiles[self.active_optimization_profile].inputs(name, declared)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    @checked("IExecutionContext")
    def set_tensor_address(self, name: str, address: int) -> bool:
        if "set_tensor_address" in self.engine.library.refuse:
            return False
        if name not in self.engine.recipe.inputs and name not in self.engine.recipe.outputs:
            return False
        self._addresses[name] = int(address)
        return True

    @checked("IExecutionContext")
    def infer_shapes(self) -> list[str]:
        return [n for n, port in self.engine.recipe.inputs.items() if -1 in port.shape and n not in self._shapes]

    @checked("IExecutionContext")
    def get_tensor_shape(self, name: str) -> Any:
        if name in self.engine.recipe.marked:
            return real.Dims([-1] if self.infer_shapes() else list(self._marked_shapes[name]))
        if name != self.engine.recipe.output[0]:
            return real.Dims(list(self._shapes.get(name, self.engine.port(name).shape)))
        declared = self.engine.recipe.output[1].shape
        rows = -1 if self.infer_shapes() else self._latent_shape
        return real.Dims(list(declared if rows == -1 else rows))

    @property
    def _marked_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the next call, told by computing one of zeros."""
        shapes = {name: self._shapes.get(name, port.shape) for name, port in self.engine.recipe.inputs.items()}
        results = self._compute({name: torch.ones(shape) for name, shape in shapes.items()})
        return {name: tuple(result.shape) for name, result in results.items()}

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        """The output has the shape of the one input that agrees with it, or only the rows of all inputs."""
        declared = self.engine.recipe.output[1].shape
        for name, port in self.engine.recipe.inputs.items():
            if port.shape == declared:
                return self._shapes[name]
        assert declared[0] == -1, "nothing tells the output's shape"
        assert -1 not in declared[1:], "nothing tells the output's shape"
        (rows,) = {shape[0] for n, shape in self._shapes.items() if self.engine.port(n).shape[0] == -1}
        return rows, *declared[1:]

    @checked("IExecutionContext")
    def execute_async_v3(self, stream: int) -> bool:
        library = self.engine.library
        if "execute_async_v3" in library.refuse:
            return False
        assert stream == STREAM, f"stream {stream}: whole graphs cannot be captured on another than the runtime's"
        assert self._stream in (None, stream), "a context was used on two streams"
        self._stream = stream
        if not self._own_memory:
            assert self._memory is not None, "no memory for activations"
            self._device.require(*self._memory, name="activations")
        assert not self.infer_shapes(), f"no shape: {self.infer_shapes()}"
        values = {name: self._read(name, port) for name, port in self.engine.recipe.inputs.items()}
        for name, result in self._compute(values).items():
            self._write(name, result)
        library.log.runs.append(self.engine.recipe.graph.name)
        return True

    def _read(self, name: str, port: Port) -> torch.Tensor | None:
        """What lies at an input's address; of a weight only that it is the right one."""
        if port.digest is not None:
            got = _digest(ctypes.string_at(self._address(name, port.size), port.size))
            assert got == port.digest, f"weight '{name}': other bytes than the weight file's"
            return None
        shape = self._shapes.get(name, port.shape)
        return _at(self._address(name, _bytes(port, shape)), port, shape).clone()

    def _address(self, name: str, size: int) -> int:
        assert name in self._addresses, f"'{name}' is not bound"
        address = self._addresses[name]
        assert address % ALIGNMENT == 0, f"'{name}' is not aligned"
        self._device.require(address, size, name)
        return address

    def _compute(self, values: Mapping[str, torch.Tensor | None]) -> dict[str, np.ndarray]:
        session = self._session
        feed = {}
        for port in session.get_inputs():
            value = values[port.name]
            assert value is not None
            feed[port.name] = (value if port.type == "tensor(int32)" else value.float()).numpy()
        names = [session.get_outputs()[0].name, *self.engine.recipe.marked]
        outputs = zip((self.engine.recipe.output[0], *self.engine.recipe.marked), session.run(names, feed), strict=True)
        return {name: np.asarray(value) for name, value in outputs}

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        graph: Path | bytes = self.engine.recipe.graph
        if self.engine.recipe.marked:
            model = onnx.load(graph)
            model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, self.engine.recipe.marked))
            graph = model.SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _write(self, name: str, result: np.ndarray) -> None:
        port = self.engine.port(name)
        shape = tuple(result.shape)
        _at(self._address(name, _bytes(port, shape)), port, shape).copy_(torch.from_numpy(result))


def _bytes(port: Port, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * torch.empty((), dtype=_TYPES[port.element][1]).element_size()


def _at(address: int, port: Port, shape: tuple[int, ...]) -> torch.Tensor:
    """A view of memory."""
    block = (ctypes.c_uint8 * _bytes(port, shape)).from_address(address)
    return torch.frombuffer(block, dtype=_TYPES[port.element][1]).view(shape)


def store_of(bundle: BundleFiles) -> Path:
    """The weight store of a bundle of layout `shared`."""
    return bundle.folder / PLAN_FOLDER / STORE_NAME

"""The double is strict: each of these misuses of the library is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as real
import torch

from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.engines.plan_weights import read_plan
from tests.doubles.host_device import STREAM, HostDevice
from tests.doubles.tensorrt_on_onnxruntime import MEMORY, ICudaEngine, IExecutionContext, Library
from tests.engines.conftest import TOKENS, WIDTH

SHAPES = {"hidden_states": (2, TOKENS, WIDTH), "pooled": (2, WIDTH), "timestep": (2,)}


class Logger(real.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        real.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        pass


class Call:
    """A call of the first plan that is right in all respects, before a test spoils one."""

    def __init__(self, folder: Path, library: Library, device: HostDevice) -> None:
        files = BundleFiles.open(folder)
        plan = files.manifest.plans[0]
        self.device, self.library, self.plan = device, library, read_plan(files.folder, plan)
        self.runtime = library.Runtime(Logger())
        self.engine: ICudaEngine = self.runtime.deserialize_cuda_engine(self.plan)
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(real.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.context: IExecutionContext = self.engine.create_execution_context(self.config)
        self.tensors = {name: device.empty(shape, torch.bfloat16) for name, shape in SHAPES.items()}
        scales = [name for name in self.engine.recipe.inputs if name not in SHAPES]
        self.tensors |= {name: device.empty((), torch.bfloat16) for name in scales}
        self.tensors["velocity"] = device.empty(SHAPES["hidden_states"], torch.bfloat16)
        self.memory = device.empty((MEMORY,), torch.uint8)
        self.bind()

    def bind(self) -> None:
        for name, tensor in self.tensors.items():
            tensor.fill_(1)
            if name in SHAPES:
                assert self.context.set_input_shape(name, SHAPES[name])
            assert self.context.set_tensor_address(name, tensor.data_ptr())
        self.context.set_device_memory(self.memory.data_ptr(), MEMORY)

    def run(self, stream: int = STREAM) -> bool:
        return self.context.execute_async_v3(stream)


@pytest.fixture
def call(planned: Callable[[Layout], Path], library: Library, device: HostDevice) -> Call:
    return Call(planned("embedded"), library, device)


def test_a_right_call_runs(call: Call) -> None:
    assert call.run()
    assert call.tensors["velocity"].content.float().isfinite().all()


def _freed(call: Call, name: str) -> None:
    del call.tensors[name]


def _smaller(call: Call, name: str) -> None:
    call.tensors[name] = call.device.empty((1,), torch.bfloat16)
    call.context.set_tensor_address(name, call.tensors[name].data_ptr())


def _unaligned(call: Call, name: str) -> None:
    call.context.set_tensor_address(name, call.tensors[name].data_ptr() + 2)


def _null(call: Call, name: str) -> None:
    call.context.set_tensor_address(name, 0)


def _unbound(call: Call, name: str) -> None:
    del call.context._addresses[name]


def _on_processor(call: Call, name: str) -> None:
    tensor = torch.ones(4096)
    call.context.set_tensor_address(name, tensor.data_ptr() + (-tensor.data_ptr() % 256))


SCALE = "blocks.0.linear.scale"


NAMES = ("hidden_states", "pooled", SCALE, "velocity")
SPOILT = [(spoil, name) for spoil in (_freed, _unaligned, _null, _unbound, _on_processor) for name in NAMES]
SPOILT += [(_smaller, name) for name in NAMES if name != SCALE]  # nothing is smaller than a scalar


@pytest.mark.parametrize(("spoil", "name"), SPOILT)
def test_a_wrong_address(call: Call, spoil: Callable[[Call, str], None], name: str) -> None:
    spoil(call, name)
    with pytest.raises(AssertionError):
        call.run()


def test_shapes_that_the_engine_does_not_take(call: Call) -> None:
    context = call.context
    assert not context.set_input_shape("hidden_states", (9, TOKENS, WIDTH))  # more rows than the profile
    assert not context.set_input_shape("hidden_states", (3, TOKENS, WIDTH))  # the first profile has two
    assert not context.set_input_shape("hidden_states", (0, TOKENS, WIDTH))
    assert not context.set_input_shape("hidden_states", (2, TOKENS, WIDTH + 1))
    assert not context.set_input_shape("hidden_states", (2, TOKENS))
    assert not context.set_input_shape("velocity", (2, TOKENS, WIDTH))
    assert not context.set_input_shape("nobody", (2,))
    assert not context.set_tensor_address("nobody", call.memory.data_ptr())
    assert not context.set_optimization_profile_async(2, STREAM)
    assert not context.set_optimization_profile_async(-1, STREAM)


def test_shapes_are_forgotten_with_the_profile(call: Call) -> None:
    assert call.context.set_optimization_profile_async(1, STREAM)
    assert set(call.context.infer_shapes()) == set(SHAPES)
    assert -1 in tuple(call.context.get_tensor_shape("velocity"))
    with pytest.raises(AssertionError, match="no shape"):
        call.run()


def test_a_second_context_has_no_profile(call: Call) -> None:
    second = call.engine.create_execution_context(call.config)
    assert second.active_optimization_profile == -1
    assert not second.set_input_shape("pooled", SHAPES["pooled"])


def test_another_stream(call: Call) -> None:
    with pytest.raises(AssertionError, match="stream"):
        call.run(0)


def test_activations(call: Call) -> None:
    with pytest.raises(AssertionError, match="too few"):
        call.context.set_device_memory(call.memory.data_ptr(), MEMORY - 1)
    with pytest.raises(AssertionError, match="not aligned"):
        call.context.set_device_memory(call.memory.data_ptr() + 1, MEMORY)
    del call.memory
    with pytest.raises(AssertionError, match="activations"):
        call.run()


def test_no_memory_for_activations(call: Call) -> None:
    call.context._memory = None
    with pytest.raises(AssertionError, match="no memory"):
        call.run()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("set_input_shape", ("pooled", torch.Size([2, WIDTH]))),
        ("set_input_shape", ("pooled", "2x16")),
        ("set_input_shape", (0, (2, WIDTH))),
        ("set_input_shape", ("pooled",)),
        ("set_tensor_address", ("pooled", "0x100")),
        ("set_tensor_address", ("pooled", torch.ones(3))),
        ("set_tensor_address", (b"pooled", 256)),
        ("set_device_memory", (256,)),
        ("set_optimization_profile_async", ("0", STREAM)),
        ("execute_async_v3", ("stream",)),
        ("execute_async_v3", ()),
    ],
)
def test_arguments_that_the_bindings_refuse(call: Call, method: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        getattr(call.context, method)(*arguments)


@pytest.mark.parametrize("plan", [3, "plan", None, [1, 2]])
def test_the_double_refuses_the_types_that_the_real_runtime_does(call: Call, plan: Any) -> None:
    for runtime in (real.Runtime(Logger()), call.runtime):
        with pytest.raises(TypeError):
            runtime.deserialize_cuda_engine(plan)


def test_the_double_fails_on_what_is_no_plan_as_the_real_runtime_does(call: Call) -> None:
    for runtime in (real.Runtime(Logger()), call.runtime):
        assert runtime.deserialize_cuda_engine(b"no plan") is None


def test_bytes_of_another_weight(planned: Callable[[Layout], Path], library: Library, device: HostDevice) -> None:
    files = BundleFiles.open(planned("shared"))
    engine = library.Runtime(Logger()).deserialize_cuda_engine(read_plan(files.folder, files.manifest.plans[0]))
    context = engine.create_execution_context(real.ExecutionContextAllocationStrategy.STATIC)
    tensors = {name: device.empty((4096,), torch.bfloat16) for name in (*engine.recipe.inputs, "velocity")}
    for name, tensor in tensors.items():
        tensor.fill_(1)
        context.set_tensor_address(name, tensor.data_ptr())
    for name, shape in SHAPES.items():
        context.set_input_shape(name, shape)
    with pytest.raises(AssertionError, match="other bytes"):
        context.execute_async_v3(STREAM)

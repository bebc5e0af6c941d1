"""One engine with its execution context: what it takes and gives, and what is bound to it.

The library's calls say by their results what went wrong. All of them are checked here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from adatsq_trt.errors import AdatsqError

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES = 256


class EngineContext:
    """An execution context that is used on one stream.

    Attributes:
        engine: the library's.
        inputs: names of the inputs.
        output: name of the one output.
        marked: names of values inside that the engine gives too.
    """

    def __init__(self, library: Any, engine: Any, context: Any, title: str, marked: Collection[str] = ()) -> None:
        """Wrap a context.

        Args:
            library: tensorrt or tensorrt_rtx.
            engine: deserialized.
            context: of the engine; None where the library refused to make one.
            title: of the engine, in messages.
            marked: values that were made outputs of the engine.

        Raises:
            AdatsqError: there is no context, or the engine has not exactly one output beside those.
        """
        self._library, self._context, self._title, self.engine = library, context, title, engine
        self._require(context is not None, "make an execution context")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        mode = library.TensorIOMode.INPUT
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == mode)
        self.marked = tuple(name for name in names if name in marked)
        outputs = [name for name in names if name not in (*self.inputs, *self.marked)]
        self._require(len(outputs) == 1, f"be used: it has {len(outputs)} outputs, expected one")
        self.output = outputs[0]
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Type of an input or of the output."""
        import torch

        library = self._library
        types = {
            library.float32: torch.float32,
            library.bfloat16: torch.bfloat16,
            library.float16: torch.float16,
            library.int32: torch.int32,
        }
        return types[self.engine.get_tensor_dtype(name)]

    def on_host(self, name: str) -> bool:
        """Whether the library reads this input on the processor, since shapes or branches depend on it."""
        return bool(self.engine.get_tensor_location(name) == self._library.TensorLocation.HOST)

    def use_memory(self, memory: torch.Tensor) -> None:
        """Let the context keep its activations here."""
        self._context.set_device_memory(memory.data_ptr(), memory.numel())

    def use_profile(self, index: int, stream: int) -> None:
        """Choose an optimization profile; shapes have to be set anew after a change."""
        if self._profile == index:
            return
        # A new context has the first profile already, and only asks for it where there are others.
        if self._profile is not None or index != self._context.active_optimization_profile:
            done = self._context.set_optimization_profile_async(index, stream)
            self._require(done, f"choose optimization profile {index}")
            self._shapes.clear()
        self._profile = index

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Say which shape an input has in the next call."""
        wanted = tuple(shape)
        if self._shapes.get(name) != wanted:
            self._require(self._context.set_input_shape(name, wanted), f"take input '{name}' as {list(wanted)}")
            self._shapes[name] = wanted

    def bind(self, name: str, address: int) -> None:
        """Say where an input or the output lies.

        Args:
            name: of the tensor.
            address: a multiple of `ALIGNMENT_BYTES`; stays valid until the calls that use it are done.
        """
        if self._addresses.get(name) != address:
            self._require(self._context.set_tensor_address(name, address), f"bind '{name}'")
            self._addresses[name] = address

    def output_shape(self, name: str | None = None) -> tuple[int, ...]:
        """Of the next call, once all shapes are set.

        Args:
            name: of a marked value; None for the output.

        Raises:
            AdatsqError: the shapes of the inputs do not decide it.
        """
        missing = self._context.infer_shapes()
        self._require(not missing, f"tell its output's shape: {', '.join(missing)} have none")
        shape = tuple(self._context.get_tensor_shape(name or self.output))
        self._require(all(size >= 0 for size in shape), f"tell its output's shape, got {list(shape)}")
        return shape

    def enqueue(self, stream: int) -> None:
        """Compute on a stream, without waiting for it."""
        self._require(self._context.execute_async_v3(stream), "run")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise AdatsqError(
                f"{self._title} refuses to {what}; run again with --debug, which logs the library's own words, and "
                "build the bundle again if its plan is at fault"
            )

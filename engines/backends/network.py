"""Common part of the Python libraries of TensorRT and TensorRT-RTX: from a graph to a plan."""

from __future__ import annotations

import logging
from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from adatsq_trt.engines.backends.base import BatchRange, Compiler, Profile
from adatsq_trt.errors import AdatsqError
from adatsq_trt.formats import Target

log = logging.getLogger(__name__)
_TOLD_ERRORS = 5


class NetworkCompiler(Compiler):
    """A library of TensorRT's family.

    Attributes:
        title: of the library, in messages.
        module: name of its Python module.
    """

    title: ClassVar[str]
    module: ClassVar[str]

    def version(self) -> str:
        """The library's version."""
        return str(self.library.__version__)

    def build(self, onnx_path: Path, target: Target, batch: BatchRange) -> bytes:
        """Compile a graph: strongly typed, dynamic axes in the given range."""
        self.require()
        self.require_target(target)
        library, told = self.library, self.make_logger()
        builder = library.Builder(told)
        self._set_up_builder(builder)
        network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = library.OnnxParser(network, told)
        self._set_up_parser(parser)
        if not parser.parse_from_file(str(onnx_path)):
            problems = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise self._refusal("cannot read", onnx_path, target, problems or told.errors)
        config = builder.create_builder_config()
        self._set_up(config, target)
        for profile in batch.profiles:
            _add_profile(builder, network, config, profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refusal("cannot compile", onnx_path, target, told.errors)
        self._finish(config, target)
        del config, network, parser, builder  # they hold the weights, and the plan is about to be copied
        return bytes(plan)

    def make_logger(self) -> Any:
        """A logger of the library that keeps errors and hands the rest to `logging`."""
        library, title = self.library, self.title

        class Logger(library.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                library.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                    self.errors.append(msg)
                log.debug("%s: %s", title, msg)

        return Logger()

    @abstractmethod
    def require_target(self, target: Target) -> None:
        """Refuse a target that the library does not compile for here.

        Raises:
            UserError: says what it does compile for.
        """

    @property
    def library(self) -> Any:
        """Its module."""
        return import_module(self.module)

    def _set_up_builder(self, builder: Any) -> None:
        """Prepare a builder before there is a network."""

    def _set_up_parser(self, parser: Any) -> None:
        """Prepare a parser before it reads a graph; nothing by default."""

    @abstractmethod
    def _set_up(self, config: Any, target: Target) -> None:
        """Make a builder's configuration one for a target."""

    def _finish(self, config: Any, target: Target) -> None:
        """Finish up when a plan has been built; nothing by default."""

    def _refusal(self, what: str, onnx_path: Path, target: Target, problems: list[str]) -> AdatsqError:
        words = "; ".join(problems[:_TOLD_ERRORS]) or "it gives no reason"
        return AdatsqError(
            f"{self.title} {self.version()} {what} '{onnx_path}' for target '{target.name}': {words}. Choose other "
            "formats or another target, or pass --simulate to study the policy without engines"
        )


def _parser_error(error: Any) -> str:
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _add_profile(builder: Any, network: Any, config: Any, profile: Profile) -> None:
    """Give every dynamic axis its least, tuned and largest size; scalar inputs have none and need no entry."""
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(size < 0 for size in tensor.shape):
            shapes.set_shape(tensor.name, *profile.inputs(tensor.name, tensor.shape))
    config.add_optimization_profile(shapes)

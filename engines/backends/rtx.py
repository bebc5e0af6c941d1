"""TensorRT-RTX: compiles for every supported GPU on a machine without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatsq_trt.engines.backends.base import BatchRange, Compiler
from adatsq_trt.errors import AdatsqError, DependencyError, UserError
from adatsq_trt.formats import TARGETS, Target

if TYPE_CHECKING:
    import tensorrt_rtx as trt

log = logging.getLogger(__name__)
_TOLD_ERRORS = 5


class RtxBackend(Compiler):
    """TensorRT-RTX."""

    name = "rtx"

    def require(self) -> None:
        """Make sure that the library is there."""
        try:
            import tensorrt_rtx  # noqa: F401
        except ImportError as error:
            raise DependencyError(f"TensorRT-RTX cannot be loaded ({error}); run: pip install tensorrt-rtx") from error

    def version(self) -> str:
        """TensorRT-RTX's version."""
        import tensorrt_rtx as trt

        return str(trt.__version__)

    def build(self, onnx_path: Path, target: Target, batch: BatchRange) -> bytes:
        """Compile a graph: strongly typed, dynamic axes in the given range; the same input gives the same bytes."""
        self.require()
        import tensorrt_rtx as trt

        capability = _capability(target)
        told = make_logger()
        builder = trt.Builder(told)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, told)
        if not parser.parse_from_file(str(onnx_path)):
            problems = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise self._refusal("cannot read", onnx_path, target, problems or told.errors)
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
        _add_profile(builder, network, config, batch)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refusal("cannot compile", onnx_path, target, told.errors)
        return bytes(plan)

    def _refusal(self, what: str, onnx_path: Path, target: Target, problems: list[str]) -> AdatsqError:
        words = "; ".join(problems[:_TOLD_ERRORS]) or "it gives no reason"
        return AdatsqError(
            f"TensorRT-RTX {self.version()} {what} '{onnx_path}' for target '{target.name}': {words}. Choose other "
            "formats or another target, or pass --simulate to study the policy without engines"
        )


def _capability(target: Target) -> trt.ComputeCapability:
    import tensorrt_rtx as trt

    capability = trt.ComputeCapability.__members__.get(f"SM{target.compute_capability}")
    if capability is None:
        gpus = [name for name, t in TARGETS.items() if t.compute_capability is not None and t.formats]
        raise UserError(f"TensorRT-RTX does not compile for target '{target.name}'; choose one of: {', '.join(gpus)}")
    return capability


def make_logger() -> Any:
    """A TensorRT logger that keeps errors and hands the rest to `logging`."""
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            log.debug("TensorRT-RTX: %s", msg)

    return Logger()


def _parser_error(error: trt.ParserError) -> str:
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, batch: BatchRange
) -> None:
    """Give every dynamic axis the batch range; scalar inputs have none and need no entry."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [
            tuple(rows if size < 0 else size for size in tensor.shape)
            for rows in (batch.minimum, batch.optimum, batch.maximum)
        ]
        if any(size < 0 for size in tensor.shape):
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)

"""TensorRT-RTX: compiles for every supported GPU on a machine without one."""

from __future__ import annotations

from typing import Any

from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.errors import DependencyError, UserError
from adatsq_trt.formats import TARGETS, Target


class RtxBackend(NetworkCompiler):
    """TensorRT-RTX; the same input gives the same bytes."""

    name, title, module = "rtx", "TensorRT-RTX", "tensorrt_rtx"

    @property
    def settings(self) -> str:
        """Setting under which plans need all their memory from outside (`_set_up`)."""
        return "require_user_allocation"

    def require(self) -> None:
        """Make sure that the library is there."""
        try:
            import tensorrt_rtx  # noqa: F401
        except ImportError as error:
            raise DependencyError(f"TensorRT-RTX cannot be loaded ({error}); run: pip install tensorrt-rtx") from error

    def require_target(self, target: Target) -> None:
        """Refuse what is no GPU, or one that the library does not know."""
        if f"SM{target.compute_capability}" not in self.library.ComputeCapability.__members__:
            gpus = [name for name, t in TARGETS.items() if t.compute_capability is not None and t.formats]
            raise UserError(
                f"TensorRT-RTX does not compile for target '{target.name}'; choose one of: {', '.join(gpus)}"
            )

    def _set_up(self, config: Any, target: Target) -> None:
        # All engines of a bundle write their activations to one block, and without memory of their own their calls can
        # be captured as CUDA graphs.
        config.set_flag(self.library.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = 1
        config.set_compute_capability(self.library.ComputeCapability.__members__[f"SM{target.compute_capability}"], 0)

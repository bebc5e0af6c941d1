"""Enterprise TensorRT, from 10.13 on and 11: compiles on a machine with a GPU, for that GPU and its like.

All that differs between TensorRT and TensorRT-RTX, or between TensorRT's versions, is in this module. In TensorRT 11
every network is strongly typed; the flag that asks for it is still there and is ignored.

It has never run with the library itself. The tests run it against TensorRT-RTX's bindings, which have the same names.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.manifest import Compatibility
from adatsq_trt.errors import DependencyError, MismatchError, OutputError, UserError
from adatsq_trt.files import sha256, write_bytes
from adatsq_trt.formats import Target

log = logging.getLogger(__name__)
LIBRARY = "tensorrt"
MINIMUM_VERSION = (10, 13)
_AMPERE = 80
_PLUGIN = ("AdatsqLinear", "1", "adatsq")  # type, version, namespace


@dataclass(frozen=True)
class TensorRTOptions:
    """How plans are built.

    Attributes:
        compatibility: other GPUs and versions that may run them.
        weight_streaming: leave weights in the host's memory as far as the GPU's does not suffice.
        timing_cache: folder that keeps measured kernels, one file for each target; None to measure anew.
        plugins: library of the plugin, for graphs of its nodes.
    """

    compatibility: Compatibility = field(default_factory=Compatibility)
    weight_streaming: bool = False
    timing_cache: Path | None = None
    plugins: Path | None = None


class TensorRTBackend(NetworkCompiler):
    """Enterprise TensorRT."""

    name, title, module = "tensorrt", "TensorRT", "tensorrt"

    def __init__(self, options: TensorRTOptions | None = None) -> None:
        """Compile with these options."""
        self.options = options or TensorRTOptions()

    @property
    def settings(self) -> str:
        """The options; where the timing cache lies changes nothing."""
        own = f"{self.options.compatibility!r} weight_streaming={self.options.weight_streaming}"
        return own if self.options.plugins is None else f"{own} plugins={sha256(self.options.plugins)}"

    def require(self) -> None:
        """Make sure that the library is there, new enough, and that there is a GPU.

        Raises:
            DependencyError: says which of these is missing.
        """
        try:
            version = self.version()
        except ImportError as error:
            raise DependencyError(
                f"TensorRT cannot be loaded ({error}); run: pip install 'adatsq-trt[tensorrt]' on a machine with an "
                "NVIDIA GPU, or build with --backend rtx, which needs neither"
            ) from error
        if version_numbers(version)[:2] < MINIMUM_VERSION:
            raise DependencyError(
                f"TensorRT {version} is installed, expected {'.'.join(map(str, MINIMUM_VERSION))} or newer; run: "
                "pip install -U 'adatsq-trt[tensorrt]'"
            )
        self._here()

    def require_target(self, target: Target) -> None:
        """Refuse another GPU than this machine's, unless the plan is to run on all since Ampere.

        Raises:
            MismatchError: names this machine's target.
        """
        here, wanted = self._here(), target.compute_capability
        compatible = self.options.compatibility.hardware == "ampere_plus" and min(here, wanted or 0) >= _AMPERE
        if wanted is None or (wanted != here and not compatible):
            raise MismatchError(
                f"--target {target.name}: TensorRT compiles for the GPU that it runs on, which is sm{here}; pass "
                f"--target sm{here}, or --hardware-compatibility ampere_plus, or --backend rtx, or build on such a GPU"
            )

    def _set_up_builder(self, builder: Any) -> None:
        if self.options.plugins is not None:
            load_plugins(builder.get_plugin_registry(), self.options.plugins)

    def _set_up_parser(self, parser: Any) -> None:
        # The vendor asks for it where plans are to run on other GPUs or versions.
        if self.options.compatibility != Compatibility():
            parser.set_flag(self.library.OnnxParserFlag.NATIVE_INSTANCENORM)

    def _set_up(self, config: Any, target: Target) -> None:
        library, options = self.library, self.options
        if options.compatibility.versions:
            config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
        if options.compatibility.hardware != "none":
            level = getattr(library.HardwareCompatibilityLevel, options.compatibility.hardware.upper())
            config.hardware_compatibility_level = level
        if options.weight_streaming:
            config.set_flag(library.BuilderFlag.WEIGHT_STREAMING)
        if options.timing_cache is not None:
            file = self._cache_file(target, options.timing_cache)
            known = file.read_bytes() if file.is_file() else b""
            cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
            if not config.set_timing_cache(cache, ignore_mismatch=False):
                log.warning("'%s' is of another GPU or version of TensorRT; measuring kernels anew", file)
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _finish(self, config: Any, target: Target) -> None:
        """Keep what was measured."""
        if self.options.timing_cache is None:
            return
        try:
            write_bytes(
                self._cache_file(target, self.options.timing_cache), bytes(config.get_timing_cache().serialize())
            )
        except OutputError as error:
            log.warning("%s; kernels will be measured again the next time", error)

    @staticmethod
    def _here() -> int:
        """Compute capability of this machine's GPU, such as 89."""
        import torch

        if not torch.cuda.is_available():
            raise DependencyError(
                "TensorRT compiles on a GPU only and PyTorch sees none; use a machine where a GPU, its driver and a "
                "CUDA build of PyTorch are, or --backend rtx, which needs none"
            )
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    @staticmethod
    def _cache_file(target: Target, folder: Path) -> Path:
        return folder / f"{target.name}.bin"


def load_plugins(registry: Any, library: Path) -> None:
    """Make the plugin's nodes known to a builder or a runtime.

    Args:
        registry: of the builder or the runtime.
        library: what 'adatsq-trt build plugins' made.

    Raises:
        UserError: TensorRT cannot load it.
    """
    # The library refuses, too, what the process has loaded for another runtime.
    if registry.load_library(str(library)) is None and registry.get_creator(*_PLUGIN) is None:
        raise UserError(
            f"TensorRT cannot load the plugin library '{library}'; build it with the headers of the installed version, "
            "as 'adatsq-trt build plugins --tensorrt-root FOLDER' does"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version such as "10.13.2.6"."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def runs_version(built: str, installed: str, compatibility: Compatibility) -> bool:
    """Whether an installed TensorRT runs plans of another.

    Args:
        built: version that compiled the plans.
        installed: version here.
        compatibility: of the plans: those for other versions run on later ones of the same major version.
    """
    if built == installed:
        return True
    then, now = version_numbers(built), version_numbers(installed)
    return compatibility.versions and then[:1] == now[:1] and then <= now


def runs_capability(target: int, here: int, compatibility: Compatibility) -> bool:
    """Whether a GPU runs plans that were compiled on another."""
    return target == here or (compatibility.hardware == "ampere_plus" and min(target, here) >= _AMPERE)

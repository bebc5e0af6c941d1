"""The interface that every backend fills: compile a graph to a plan, load it, run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from adatsq_trt.engines.generation import Array, ArrayLoop, Arrays, DenoisingLoop, DenoisingRequest
from adatsq_trt.errors import UserError
from adatsq_trt.formats import Target

if TYPE_CHECKING:
    from adatsq_trt.engines.bundle import BundleFiles


@dataclass(frozen=True)
class Profile:
    """One optimization profile: what a graph's dynamic axes may be, and what the compiler tunes for.

    Rows are samples times guidance branches.

    Attributes:
        minimum: fewest rows.
        optimum: rows that the compiler tunes for.
        maximum: most rows.
        shapes: of a graph for several sizes: input name → its shape at this size, 0 in the place of the rows.
    """

    minimum: int
    optimum: int
    maximum: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def inputs(self, name: str, declared: Sequence[int | str]) -> tuple[tuple[int, ...], ...]:
        """Least, tuned and largest shape of an input.

        Args:
            name: of the input.
            declared: its shape in the graph; a string or a negative number stands for a dynamic axis.
        """
        own = dict(self.shapes).get(name, tuple(0 if isinstance(n, str) or n < 0 else n for n in declared))
        return tuple(tuple(size or rows for size in own) for rows in (self.minimum, self.optimum, self.maximum))


@dataclass(frozen=True)
class BatchRange:
    """Optimization profiles of a graph: by the number of rows, and by size if the graph is for several.

    Attributes:
        minimum: fewest rows.
        optimum: rows that the compiler tunes for.
        maximum: most rows.
        smaller: ascending; for each there is a profile of its own, up to so many rows and tuned for as many.
        sizes: of a graph for several sizes: these are all its profiles.
    """

    minimum: int
    optimum: int
    maximum: int
    smaller: tuple[int, ...] = ()
    sizes: tuple[Profile, ...] = ()

    @classmethod
    def of_sizes(cls, profiles: Sequence[Profile]) -> BatchRange:
        """The range of a graph for several sizes, at least one."""
        most = max(profile.maximum for profile in profiles)
        return cls(min(profile.minimum for profile in profiles), most, most, sizes=tuple(profiles))

    @property
    def whole(self) -> Profile:
        """The one profile that holds all numbers of rows at one size."""
        return Profile(self.minimum, self.optimum, self.maximum)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All optimization profiles; those by rows from the smallest."""
        return self.sizes or (*(Profile(self.minimum, rows, rows) for rows in self.smaller), self.whole)


class Runner(ABC):
    """A loaded graph or plan; a context manager that gives its memory back at the end."""

    def __enter__(self) -> Self:
        """Take the runner."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give its memory back."""
        self.close()

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name, from the inputs, by name."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the runner is of no use afterwards."""


class StepRunner(ABC):
    """Runs the denoiser of a bundle at any step; a context manager that gives its memory back at the end.

    It holds every weight once, however many assignments use it.
    """

    def __init__(self, files: BundleFiles) -> None:
        """Take a bundle's files."""
        self._files, self._closed = files, False

    def __enter__(self) -> Self:
        """Take the runner."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give its memory back."""
        self.close()

    @abstractmethod
    def run(self, step: int, inputs: Arrays, size: tuple[int, ...] | None = None) -> Array:
        """Predict the velocity, float32 [rows, ...], with a step's formats and activation scales.

        Args:
            step: index in the loop.
            inputs: name → [rows, ...], float32 arrays or tensors.
            size: in pixels, one of the bundle's; None for its own.

        Raises:
            UserError: as `require_open`.
        """

    def set_loras(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Fill a bundle's slots for LoRAs, from the next call on; they are empty at first.

        Args:
            matrices: graph input → float32, for every slot (`LoraSlots.shapes`).

        Raises:
            UserError: as `require_open`.
        """
        raise UserError(f"bundle '{self._files.folder}' takes no LoRAs here; fuse them when it is built, with --lora")

    def loop(self, request: DenoisingRequest) -> DenoisingLoop:
        """Begin a run of the denoising loop.

        Raises:
            UserError: as `require_open`.
        """
        self.require_open()
        return ArrayLoop(self.run, request)

    def working(self) -> AbstractContextManager[None]:
        """Return the context manager that the loop runs in."""
        return nullcontext()

    def synchronize(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait until all that was begun is done."""

    def require_open(self) -> None:
        """Refuse a call after `close`.

        Raises:
            UserError: names the bundle.
        """
        if self._closed:
            raise closed_error(self._files)

    def close(self) -> None:
        """Give the memory back; every later call is refused, also by loops that had begun."""
        if not self._closed:
            self._closed = True
            self._free()

    @abstractmethod
    def _free(self) -> None:
        """Give the memory back."""


def closed_error(files: BundleFiles) -> UserError:
    """Say that a bundle was closed before it was called."""
    return UserError(f"bundle '{files.folder}' is closed and its memory given back; open it again with Bundle.open")


class Backend(ABC):
    """A library that runs graphs or plans.

    Attributes:
        name: in manifests and on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def require(self) -> None:
        """Make sure that the library is there.

        Raises:
            DependencyError: it is not; says what to install.
        """

    @abstractmethod
    def version(self) -> str:
        """The library's version."""


class Compiler(Backend):
    """A backend that compiles a graph to a plan before it can be loaded."""

    @property
    def settings(self) -> str:
        """Compiler settings that plans depend on, beside graph, target, batch and version; others build them again."""
        return ""

    @abstractmethod
    def build(self, onnx_path: Path, target: Target, batch: BatchRange) -> bytes:
        """Compile a graph for a target.

        Args:
            onnx_path: external data is found beside it.
            target: a GPU target.
            batch: bounds of the graph's dynamic axes.

        Raises:
            AdatsqError: the compiler refuses the graph; with its own words.
        """

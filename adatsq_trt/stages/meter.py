"""Wall-clock time and peak memory of a block of code, reported while it runs."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from adatsq_trt.errors import OutputError

LOGGER = logging.getLogger(__name__)

_SAMPLE_SECONDS = 0.05


class Meter:
    """A context manager that measures its block.

    Attributes:
        seconds: wall-clock time since the block began; fixed when it ends.
        peak_bytes: largest resident memory of this process while in the block: exact when the block sets the record
            of the whole process, else the largest of samples taken every 50 ms.
    """

    def __init__(self, save: Callable[[float, int], None], save_seconds: float = 5.0) -> None:
        """Prepare to measure.

        Args:
            save: called with `seconds` and `peak_bytes` every `save_seconds`, and once when the block fails, so that
                the account of a killed process is not lost.
            save_seconds: time between two calls.
        """
        self.seconds = 0.0
        self.peak_bytes = 0
        self._save, self._save_seconds = save, save_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        """Start the clock."""
        self._start, self._record_before = time.monotonic(), _process_record_bytes()
        self._update()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the clock."""
        self._stop.set()
        self._thread.join()
        self._update()
        if kind is not None:
            self._try_to_save()

    def _watch(self) -> None:
        saved = self._start
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._update()
            if time.monotonic() - saved >= self._save_seconds:
                saved = time.monotonic()
                self._try_to_save()

    def _update(self) -> None:
        self.seconds = time.monotonic() - self._start
        record = _process_record_bytes()
        now = record if record > self._record_before else resident_bytes()
        self.peak_bytes = max(self.peak_bytes, now)

    def _try_to_save(self) -> None:
        try:
            self._save(self.seconds, self.peak_bytes)
        except OutputError as error:  # the block itself meets the same disk and says so
            LOGGER.debug("the account of a stage was not saved: %s", error)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def machine_bytes() -> int:
    """Memory of this machine, or of the container where that has less."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups of version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # not Linux, the other version, or no limit: "max"
            limits.append(int(Path("/sys/fs/cgroup", file).read_text(encoding="ascii")))
    return min(limits)


def release_memory() -> None:
    """Give what Python and the C library hold of freed objects back to the system, where that can be asked for."""
    import ctypes

    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _process_record_bytes() -> int:
    """Largest resident memory of this process since it began; Linux counts kibibytes, macOS bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

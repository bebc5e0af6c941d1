"""One loader of diffusers or transformers at a time.

While their `from_pretrained` runs, these libraries replace functions of `torch.nn` for the whole process and put back
what they found. Two threads that overlap put back each other's replacement, so that every later module of the process
has parameters without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_LOADING = RLock()

# Without accelerate's loading of diffusers models, which gives the parameters of *all* modules that are made meanwhile,
# in whichever thread, to the meta device.
PLAIN_LOADING: dict[str, Any] = {"low_cpu_mem_usage": False}


@contextmanager
def one_loader() -> Iterator[None]:
    """Wait until no other thread loads with diffusers or transformers."""
    with _LOADING:
        yield

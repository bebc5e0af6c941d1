"""One loader of diffusers or transformers at a time.

While their `from_pretrained` runs, these libraries replace functions of `torch.nn` for the whole process and put back
what they found. Two threads that overlap put back each other's replacement, so that every later module of the process
has parameters without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from threading import RLock
from typing import Any

_LOADING = RLock()

# Without accelerate's loading of diffusers models, which gives the parameters of *all* modules that are made meanwhile,
# in whichever thread, to the meta device.
PLAIN_LOADING: dict[str, Any] = {"low_cpu_mem_usage": False}


def of_parts(pipeline: Any) -> Any:
    """The class of a pipeline, which can also be made without a VAE.

    HunyuanVideo15Pipeline asks a VAE that is None for its configuration, and none where there is no VAE yet.
    """

    class Parts(pipeline):  # type: ignore[misc]
        @wraps(pipeline.__init__)  # type: ignore[misc]
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            if "vae" in signature(pipeline.__init__).parameters and not hasattr(self, "vae"):
                super().register_modules(vae=None)

        def register_modules(self, **modules: Any) -> None:
            given = {name: part for name, part in modules.items() if name != "vae" or part is not None}
            super().register_modules(**given)

    Parts.__name__ = pipeline.__name__
    return Parts


@contextmanager
def one_loader() -> Iterator[None]:
    """Wait until no other thread loads with diffusers or transformers."""
    with _LOADING:
        yield

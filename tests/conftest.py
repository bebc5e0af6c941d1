"""Settings and fixtures for all tests."""

import os
import secrets

# Two xdist workers on two cores: four spinning threads in all make a denoising step many times slower than one thread
# each does. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels in the Triton language run in its interpreter, which it decides when it is imported: diffusers does that. On a
# GPU they are compiled: TRITON_INTERPRET=0 python -m pytest -m gpu
os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads this when it is first imported, by whichever test: `--ray local` answers only those who know the token.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import gc
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from adatsq_trt.models.flux import FluxAdapter

# The first example of a test may import torch, so a deadline per example would measure the machine.
settings.register_profile(
    "adatsq", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("adatsq")


# The collector would walk over all of PyTorch, diffusers and transformers again and again: a tenth of all tests' time.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    """Do once what every test would do again."""
    if "torch" in sys.modules:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        # At every trace the exporter parses the source of 500 operators, which takes as long as a small model.
        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
    # Out of the collector's sight with all that was imported.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter end as it does elsewhere: libraries complain about what was not collected."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def untrained_flux() -> "FluxAdapter":
    """The zoo's architecture with random weights: for tests that need the real class but no trained one."""
    import torch

    from examples.zoo.train_digits_flux import make_adapter

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_adapter()


@pytest.fixture(scope="session")
def small_zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo, with digits-flux cut down to one block of either kind: it takes a third of the time."""
    from adatsq_trt.zoo import zoo_models
    from tests.one_block import FLUX, write_model

    folder = tmp_path_factory.mktemp("zoo")
    for name, path in zoo_models().items():
        if name != FLUX.model:
            (folder / name).symlink_to(path)
    write_model(folder / FLUX.model, FLUX)
    return folder


@pytest.fixture(scope="module")
def small_zoo(small_zoo_folder: Path) -> Iterator[None]:
    """Models are found there, and traced once."""
    from tests.traces import trace_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adatsq_trt.zoo.ZOO_FOLDER", small_zoo_folder)
        patch.setattr("adatsq_trt.stages.export.trace", trace_once)
        yield


@contextmanager
def _limited_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not notice that a write of bytecode fell short, and puts the stump where every later import,
        # of any process, reads it. The variable is for child processes.
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """A block in which no file may grow beyond 4 KiB: the system refuses the write as it does on a full disk."""
    return _limited_files

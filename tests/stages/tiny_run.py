"""Runs of a tiny Flux with random weights: the stages themselves, without a command line or a model of the zoo."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adatsq_trt.image import PixelScale
from adatsq_trt.policy import Policy
from adatsq_trt.settings import Settings
from adatsq_trt.stages.context import Context, Memory
from adatsq_trt.stages.models import declared
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.zoo.loading import LoadedModel
from tests.tiny_flux import make_tiny_flux

HASH = "0" * 64


def make_settings(**changes: Any) -> Settings:
    """Those of a build for the processor in two formats, with the least effort."""
    return Settings(
        **{
            "model": "tiny",
            "weights_sha256": HASH,
            "model_sha256": HASH,
            "format_set": "cpu",
            "formats": ("w8a8s", "fp32"),
            "targets": ("cpu",),
            "simulate": False,
            "steps": 2,
            "guidance": 2.0,
            "budget_bits": 20.0,
            "weights": "once",
            "beam": 2,
            "candidates": 2,
            "projections": 2,
            "calibration_samples": 2,
            "selection_samples": 2,
            "held_out_samples": 2,
            **changes,
        }
    )


def make_model(blocks: int = 1) -> LoadedModel:
    """As it is loaded, with the checkpoint's own numbers."""
    return LoadedModel("tiny", make_tiny_flux(32, 4, blocks=blocks), HASH, HASH, 2, 2.0, PixelScale(1))


def given_policy(*formats: str) -> Policy:
    """Two steps with an assignment each, of two formats in turns, fp8 and bf16 by default: in place of a search."""
    layers = list(make_model().adapter.quantizable_layers())
    rows = [[(formats or ("fp8", "bf16"))[(layer + step) % 2] for layer in range(len(layers))] for step in range(2)]
    return Policy.from_steps("tiny", HASH, layers, rows)


@contextmanager
def tiny_context(folder: Path, memory: Memory | None = None, blocks: int = 1, **changes: Any) -> Iterator[Context]:
    """A run of which nothing is done."""
    settings = make_settings(**changes)
    with RunDirectory.open(folder) as run:
        yield Context(run, settings, declared(make_model(blocks), settings), memory or Memory())

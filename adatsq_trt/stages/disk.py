"""Estimate of what a run keeps on disk, from shapes, made before anything runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from adatsq_trt.formats import Granularity, Grid, format_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.format_store import weight_owners
from adatsq_trt.models.stored import count_weights
from adatsq_trt.settings import Settings
from adatsq_trt.stages import gradients, search
from adatsq_trt.stages.memory import count_encodings

LOGGER = logging.getLogger(__name__)
_FLOAT = 4  # bytes of a number of most files


def disk_bytes(settings: Settings, adapter: ModelAdapter) -> dict[str, int]:
    """Stage → bytes of its large files, in the order of the stages.

    Args:
        settings: of the run.
        adapter: its model, whose weights need not be in memory.
    """
    linears = adapter.quantizable_layers().values()
    shapes = [(linear.in_features, linear.out_features) for linear in linears]
    grids = list(dict.fromkeys(format_named(name).weight for name in settings.formats))
    squares = sum(_FLOAT * width**2 for width, _ in shapes)
    latents = settings.calibration_samples * settings.steps * prod(adapter.latent_shape) * _FLOAT
    places = settings.calibration_samples * settings.projections * settings.steps * len(shapes)
    # With and without weights by steps or gradients; while gradients are summed, the sums of two parts beside them.
    hessians = 2 if settings.hessian not in gradients.FORMS else 4
    rest, packed = 2 * _rest(adapter, shapes), _packed(settings, shapes)
    # The full-precision graph has all weights, those of a 16-bit candidate.
    plain = 0 if any(grid.is_float for grid in grids) else sum(2 * k * n for k, n in shapes)
    graphs, encodings = sum(packed) + plain + rest, _FLOAT * count_encodings(adapter)
    # A whole plan for each assignment and target; those of other layouts share weights, which are in the graphs.
    whole = settings.layout == "embedded" and not settings.simulate
    transformers = len(set(adapter.schedule(settings.asked_steps).experts)) or 1  # a plan holds one
    plans = len(settings.targets) * search.most_assignments(settings) if whole else 0
    return {
        "calibrate": hessians * squares + 2 * latents,
        "quantize": sum(_stored(grid, shapes) for grid in grids),
        "search": 0 if settings.policy is not None else _FLOAT * places * len(settings.formats),
        # Every weight grid at most, the rest of the model in 16 bits, encodings; the bundle is a copy, with the plans.
        "export": graphs + encodings,
        "bundle": graphs + encodings + plans * (max(packed) + rest) // transformers,
    }


def warn_when_full(needed: int, folder: Path) -> None:
    """Say that a disk has less room than a run needs, beside what the run has there already."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free + there < needed:
        LOGGER.warning(
            "the disk of '%s' has %.1f GB left, and the run needs about %.1f GB; pass --output on a larger one",
            *(folder, free / 1e9, needed / 1e9),
        )


def _stored(grid: Grid, shapes: Sequence[tuple[int, int]]) -> int:
    """Codes in whole bytes, and scales in float32."""
    return sum(rows * (width * max(1, grid.bits // 8) + _FLOAT * _scales(grid, width)) for width, rows in shapes)


def _scales(grid: Grid, width: int) -> int:
    """Scales of an output channel."""
    if grid.granularity is Granularity.GROUP:
        return width // (grid.group_of(width) or grid.group_size)
    return int(grid.granularity is Granularity.CHANNEL)


def _packed(settings: Settings, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes of all weights in each grid, as graphs hold them."""
    owners = dict.fromkeys(weight_owners(map(format_named, settings.formats)).values())
    return [sum(round(k * n * fmt.stored_weight_bits(k) / 8) for k, n in shapes) for fmt in map(format_named, owners)]


def _rest(adapter: ModelAdapter, shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters that are not quantized."""
    return count_weights(adapter.transformer) - sum(k * n for k, n in shapes)

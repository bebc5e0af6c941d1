"""How long the units of a search would take on Flux-dev: arithmetic on counts, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL as POLICY_PART
from adatsq_trt.calibration.units import SAMPLES_PER_CALL as SWEEP_PART
from adatsq_trt.settings import Settings

# What is assumed of a model: denoising steps, seconds of a GPU for one step of one sample.
STEPS, SECONDS = 50, 0.5
# A backward pass costs about two forward passes.
BACKWARD = 2
WORKERS = (1, 8, 64)
_DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


@dataclass(frozen=True)
class Kind:
    """Units of one kind.

    Attributes:
        name: of the kind.
        rounds: how often the search waits for all units that it gave out.
        width: units that can run at the same time.
        calls: denoiser steps of one sample in a unit.
    """

    name: str
    rounds: int
    width: int
    calls: int

    def seconds(self, workers: int) -> float:
        """Wall-clock time, if nothing but the denoiser takes any."""
        return self.rounds * ceil(self.width / workers) * self.calls * SECONDS


def kinds(screened: int, shortlist: int, reported: int) -> list[Kind]:
    """All units of a search with the default settings.

    Args:
        screened: policies that are judged.
        shortlist: those that are rescored.
        reported: those that are measured on held-out samples.
    """
    samples, projections = _DEFAULTS["calibration_samples"], _DEFAULTS["projections"]
    selection, held_out = _DEFAULTS["selection_samples"], _DEFAULTS["held_out_samples"]
    sweep, moves = ceil(samples / SWEEP_PART), _DEFAULTS["beam"] * (_DEFAULTS["candidates"] + 1)
    # One policy more, full precision, is what others are compared with.
    parts = screened + 1 + (shortlist + 1) * ceil((selection - POLICY_PART) / POLICY_PART)
    return [
        Kind("trajectory", STEPS, sweep, SWEEP_PART),
        Kind("Fisher information", STEPS, sweep, SWEEP_PART * (1 + BACKWARD)),
        Kind("Hessians", 1, STEPS, samples),
        Kind("sensitivity", STEPS, sweep, SWEEP_PART * (1 + BACKWARD * projections)),
        Kind("beam", STEPS, moves, samples),
        Kind("screening and finalists", 1, parts, POLICY_PART * STEPS),
        Kind("held-out samples", 1, (reported + 1) * ceil(held_out / POLICY_PART), POLICY_PART * STEPS),
    ]


def table(screened: int, shortlist: int, reported: int) -> str:
    """Hours for every number of workers, Markdown."""
    found = kinds(screened, shortlist, reported)
    lines = [
        "| units | rounds × units in one | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in WORKERS) + " |",
        "|---|---:|" + "---:|" * len(WORKERS),
    ]
    for kind in found:
        hours = " | ".join(f"{kind.seconds(n) / 3600:.1f} h" for n in WORKERS)
        lines.append(f"| {kind.name} | {kind.rounds} × {kind.width} | {hours} |")
    total = " | ".join(f"{sum(kind.seconds(n) for kind in found) / 3600:.1f} h" for n in WORKERS)
    return "\n".join([*lines, f"| all | | {total} |"])

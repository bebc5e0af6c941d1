"""`adatsq-trt build engine`: all stages, from a model to a bundle of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adatsq_trt.cli.options import Request, StageName, run_stages

Model = Annotated[str, typer.Argument(help="Name of a model: see 'adatsq-trt models'.")]
TargetOption = Annotated[
    list[str] | None, typer.Option("--target", help="sm80, sm86, sm89, sm120 or cpu; may be repeated.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run directory; default runs/MODEL-TARGET.")]
Formats = Annotated[
    str | None, typer.Option("--formats", help="A format set or a comma-separated list; default the target's set.")
]
Budget = Annotated[
    float | None, typer.Option("--budget-bits", help="Largest mean of (weight + activation bits) / 2; default the set's.")
]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="Allow formats without an accelerated path; write no plans.")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps; default the model's.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale; default the model's.")]
Policy = Annotated[Path | None, typer.Option("--policy", help="Use this policy.json instead of searching.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts, noise and projections.")]
Beam = Annotated[int | None, typer.Option("--beam", min=1, help="Paths kept per step.")]
Candidates = Annotated[int | None, typer.Option("--candidates", min=1, help="Assignments tried per path and step.")]
Calibration = Annotated[int | None, typer.Option("--calibration-samples", min=1, help="Trajectories measured on.")]
Selection = Annotated[
    int | None, typer.Option("--selection-samples", min=1, help="Fresh trajectories that decide between policies.")
]
HeldOut = Annotated[
    int | None, typer.Option("--held-out-samples", min=1, help="Trajectories that reported errors are measured on.")
]


def engine(
    model: Model,
    target: TargetOption = None,
    output: Output = None,
    formats: Formats = None,
    budget_bits: Budget = None,
    simulate: Simulate = False,
    steps: Steps = None,
    guidance: Guidance = None,
    policy: Policy = None,
    seed: Seed = 0,
    beam: Beam = None,
    candidates: Candidates = None,
    calibration_samples: Calibration = None,
    selection_samples: Selection = None,
    held_out_samples: HeldOut = None,
    until: Annotated[StageName, typer.Option(hidden=True)] = StageName.BUNDLE,
) -> None:
    """Calibrate, quantize, search, export and build: from a model to TensorRT engines."""
    counts = {
        "beam": beam,
        "candidates": candidates,
        "calibration_samples": calibration_samples,
        "selection_samples": selection_samples,
        "held_out_samples": held_out_samples,
    }
    request = Request(
        model=model,
        targets=tuple(dict.fromkeys(target or ())),
        output=output,
        formats=formats,
        budget_bits=budget_bits,
        simulate=simulate,
        steps=steps,
        guidance=guidance,
        policy=policy,
        seed=seed,
        counts={name: value for name, value in counts.items() if value is not None},
    )
    run_stages(request, until)

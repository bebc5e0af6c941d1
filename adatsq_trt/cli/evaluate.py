"""`adatsq-trt evaluate`: quantization methods side by side on one model."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from adatsq_trt.cli.build import Model

_MOST = 100_000

Methods = Annotated[str, typer.Option("--methods", help="Names with commas between, or 'all'.")]
Bits = Annotated[str, typer.Option("--bits", help="Weights/activations: 4/4, 3/3 or both.")]
SampleCount = Annotated[int, typer.Option("--samples", min=6, max=_MOST, help="Pictures of every cell.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder of cells; finished ones are reused.", show_default="runs/evaluate-MODEL"
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of calibration and samples.")]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps.", show_default="the model's")
]
Calibration = Annotated[
    int, typer.Option("--calibration-samples", min=1, max=_MOST, help="Trajectories that all calibrate on.")
]
Selection = Annotated[
    int, typer.Option("--selection-samples", min=1, max=_MOST, help="Trajectories that policies are chosen on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the cells as JSON instead of a table.")]


def evaluate(
    model: Model,
    methods: Methods = "all",
    bits: Bits = "4/4,3/3",
    samples: SampleCount = 600,
    output: Output = None,
    seed: Seed = 0,
    steps: Steps = None,
    calibration_samples: Calibration = 64,
    selection_samples: Selection = 256,
    json: AsJson = False,
) -> None:
    """Score quantization methods: pictures that show what was asked for, and PSNR against full precision.

    All methods quantize the same layers and get the same calibration samples, prompts and seeds. Nothing is exported.

    Example: adatsq-trt evaluate scenes-flux-schnell --methods rtn,adatsq --bits 4/4 --samples 120
    """
    from adatsq_trt.zoo import find_model

    find_model(model)
    pairs = _pairs(methods, bits)

    from rich.console import Console

    from adatsq_trt.cli.progress import bars
    from adatsq_trt.progress import Reporter
    from adatsq_trt.stages.evaluate import Effort, Evaluation
    from adatsq_trt.stages.quality import table
    from adatsq_trt.zoo.loading import load_model

    loaded = load_model(model)
    effort = Effort(
        model=model,
        model_sha256=loaded.model_sha256,
        samples=samples,
        seed=seed,
        steps=steps or loaded.default_steps,
        guidance=loaded.default_guidance,
        calibration_samples=calibration_samples,
        selection_samples=selection_samples,
        prompts="apart",
    )
    with bars() as progress:
        folder = output or Path("runs") / f"evaluate-{model}"
        evaluation = Evaluation(folder, effort, loaded, Reporter(progress))
        cells = [evaluation.cell(method, width) for method, width in pairs]
    if json:
        typer.echo(json_format.dumps([cell.model_dump() for cell in cells], indent=2))
        return
    Console().print(table(evaluation, cells))


def _pairs(methods: str, bits: str) -> list[Any]:
    """(method, bits) of every cell that was asked for, full precision first.

    Raises:
        UnknownNameError: no such method or bits.
        DependencyError: a method's library is not installed.
    """
    from adatsq_trt.evaluation.methods import BITS, FULL_BITS, FULL_PRECISION, METHODS, method_named, require_bits
    from adatsq_trt.evaluation.peers import require_peers

    wanted = require_peers(method_named(name) for name in (METHODS if methods == "all" else methods.split(",")))
    widths = [width for width in dict.fromkeys(bits.split(",")) if require_bits(width)]
    quantized = [method for method in wanted if method.name != FULL_PRECISION]
    pairs = [(method, width) for width in sorted(widths, key=BITS.index) for method in quantized]
    return [(method_named(FULL_PRECISION), FULL_BITS), *pairs]

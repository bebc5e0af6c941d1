"""Searched policies of a tiny random Wan with its own scheduler, UniPC, and with Euler's method.

    python -m benchmarks.pipelines.policies [--document docs/adapters.md]

One search with small effort for each scheduler and number of steps, in a temporary folder. Errors are latent MSE on
held-out seeds against the full-precision loop with the same scheduler. Writes policies.json beside this file.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from pydantic import BaseModel, ConfigDict

import adatsq_trt
from adatsq_trt.checkpoints.loading import silence
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.search.select import SearchResult
from benchmarks.document import replace_marked
from benchmarks.pipelines.run import FRAMES, PROMPTS
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline

RESULTS = Path(__file__).with_name("policies.json")
STEPS = (8, 25)
EFFORT = {
    "calibration_samples": 8,
    "selection_samples": 16,
    "held_out_samples": 32,
    "beam": 2,
    "candidates": 3,
    "budget_bits": 7.0,
    "weights": "free",
    "formats": "nvfp4,fp8,bf16",
}


class Row(BaseModel):
    """One search.

    Attributes:
        scheduler: class.
        steps: of the pipeline, and calls of the model.
        mean_bits: of the policy.
        kind: where the policy comes from.
        error: of the policy.
        standard_error: of that mean.
        uniform: format → error of that format everywhere.
        memory: earlier predictions that a step combines at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: str
    steps: int
    mean_bits: float
    kind: str
    error: float
    standard_error: float
    uniform: dict[str, float]
    memory: int


class Results(BaseModel):
    """All searches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[Row, ...]


def measure(pipe: WanPipeline, steps: int) -> Row:
    """Search a policy."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, run = Path(folder, "prompts.txt"), Path(folder, "run")
        prompts.write_text("\n".join(PROMPTS))
        size = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES}
        adatsq_trt.search_policy(
            pipe, output=run, target="sm120", prompts=prompts, steps=steps, guidance=4.0, **size, **EFFORT
        )
        result = read_json_model(run / "search" / "result.json", SearchResult)
    chosen = result.points[result.chosen]
    assert chosen.held_out_error is not None
    assert chosen.held_out_standard_error is not None
    uniform = {p.name: p.held_out_error for p in result.points if p.kind == "uniform" and p.held_out_error is not None}
    schedule = adatsq_trt.make_schedule(pipe.scheduler, steps)
    return Row(
        scheduler=type(pipe.scheduler).__name__,
        steps=steps,
        mean_bits=chosen.mean_bits,
        kind=chosen.kind,
        error=chosen.held_out_error,
        standard_error=chosen.held_out_standard_error,
        uniform=uniform,
        memory=schedule.solver.memory,
    )


def table(rows: tuple[Row, ...]) -> str:
    """Markdown."""
    names = list(rows[0].uniform)
    lines = [
        f"| scheduler | steps | earlier predictions in a step | mean bits | error | {' | '.join(names)} everywhere |",
        f"|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in rows:
        figures = f"{row.steps} | {row.memory} | {row.mean_bits:.2f} | {row.error:.2e} ± {row.standard_error:.1e}"
        lines.append(f"| {row.scheduler} | {figures} | {' | '.join(f'{row.uniform[name]:.2e}' for name in names)} |")
    return "\n".join(lines)


def main() -> int:
    """Run all searches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="Markdown with the markers bench-pipelines-policies")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    silence()
    rows = []
    for steps in STEPS:
        pipe = make_wan_pipeline()
        rows.append(measure(pipe, steps))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        rows.append(measure(pipe, steps))
    write_json_model(RESULTS, Results(rows=tuple(rows)))
    text = table(tuple(rows))
    sys.stdout.write(f"{text}\n")
    if arguments.document is not None:
        replace_marked(arguments.document, "bench-pipelines-policies", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

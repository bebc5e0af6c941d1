"""Denoiser calls and seconds of a search: beam 4, at most four candidates per path and step, one calibration sample.

    python -m benchmarks.search.run

Searches digits-flux, scenes-flux-schnell and scenes-flux-dev on the CPU, each in runs/bench-search/MODEL, with the
paper's formats. Writes results.json beside this file and prints a Markdown table. Steps, beam and candidates decide the
number of the beam's calls, so that of scenes-flux-dev is Flux-dev's at 50 steps.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from adatsq_trt.files import read_json_model, read_tensors, write_json_model
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.models import open_run

RUNS, RESULTS = Path("runs/bench-search"), Path(__file__).with_name("results.json")
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
MODELS = ("digits-flux", "scenes-flux-schnell", "scenes-flux-dev")
# The previous assignment is a candidate besides those that are asked for.
OPTIONS = (
    "--simulate",
    "--formats",
    "paper",
    "--weights",
    "free",
    "--budget-bits",
    "4",
    "--beam",
    "4",
    "--candidates",
    "3",
)
SAMPLES = ("--calibration-samples", "1", "--selection-samples", "1", "--held-out-samples", "1")
REPETITIONS = 20


class Row(BaseModel):
    """One search.

    Attributes:
        steps: denoising steps.
        beam_calls: denoiser calls of the beam.
        calls: of beam and selection.
        seconds_per_call: median of one call of the fake-quantized model with one sample.
        calls_seconds: calls times seconds_per_call.
        seconds: of the whole stage, with sensitivities and held-out samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    steps: int
    beam_calls: int
    calls: int
    seconds_per_call: float
    calls_seconds: float
    seconds: float


class Results(BaseModel):
    """Content of results.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    device: Literal["cpu"] = "cpu"
    machine: str
    threads: int
    torch: str
    options: str
    rows: tuple[Row, ...]


def seconds_per_call(context: Context, policy: Policy) -> float:
    """Median time of one denoising step of one sample, under the chosen policy's first assignment."""
    samples, seconds = context.calibration, []
    with SimulatedModel(context.adapter, quantize.load(context)).installed() as model:
        model.assign(policy.formats_at(0), 0)
        latent = samples.noise()
        samples.velocity(latent, 0)
        for _ in range(REPETITIONS):
            start = perf_counter()
            samples.velocity(latent, 0)
            seconds.append(perf_counter() - start)
    return median(seconds)


def measure(model: str) -> Row:
    """Search, unless that is done, and read its account."""
    run = RUNS / model
    subprocess.run([SCRIPT, "search", model, *OPTIONS, *SAMPLES, "--device", "cpu", "--output", run], check=True)
    context = open_run(run)
    folder, steps = search.stage(context).folder, context.settings.steps
    result = read_json_model(folder / search.RESULT, SearchResult)
    column = read_tensors(folder / "columns" / f"column_{steps - 1:03d}.safetensors")
    each = seconds_per_call(context, Policy.load(folder / search.POLICY))
    return Row(
        model=model,
        steps=steps,
        beam_calls=int(column["calls"]),
        calls=result.denoiser_calls,
        seconds_per_call=each,
        calls_seconds=each * result.denoiser_calls,
        seconds=context.run.record(search.NAME).seconds,
    )


def table(results: Results) -> str:
    """The results in Markdown."""
    heads = ("model", "steps", "calls of the beam", "all calls", "ms per call", "calls x ms, s", "search, s")
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    for r in results.rows:
        figures = (r.steps, r.beam_calls, r.calls, f"{1e3 * r.seconds_per_call:.1f}", f"{r.calls_seconds:.1f}")
        lines.append(f"| {r.model} | {' | '.join(map(str, figures))} | {r.seconds:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = tuple(measure(model) for model in MODELS)
    results = Results(
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        options=" ".join([*OPTIONS, *SAMPLES]),
        rows=rows,
    )
    write_json_model(RESULTS, results)
    print(table(results))


if __name__ == "__main__":
    main()

"""Seconds of a search on the configuration of Flux-dev with random weights: flux_dev.json, a row for each size.

    python -m benchmarks.search.flux_dev [--device cuda] [--sizes 512:50,1024:10] [--blocks 19,38] [--heads 24]
        [--precision bfloat16] [--expansions 4] [--document docs/scaling.md]

A size is pixels, a colon and denoising steps.

Beam 4, three candidates per path and step beside the previous assignment, one calibration sample with one projection,
the paper's formats. The model is made on the device and never written; weights are rounded to nearest, since a solver
makes the search neither slower nor faster, and with random weights the policy says nothing. Fewer blocks or heads make
another model, whose row says so: that is for a machine without such a GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from pydantic import BaseModel, ConfigDict

from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.trajectory import seeded_samples
from adatsq_trt.calibration.units import measured_trajectory
from adatsq_trt.execution import Executor, InProcess
from adatsq_trt.execution.device import CPU, CUDA, OnDevice, free_bytes, parse_device
from adatsq_trt.execution.precision import Bfloat16
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.formats import resolve_formats
from adatsq_trt.image import ImageShape
from adatsq_trt.models.flow import measure_flow
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.prompts import StoredPrompts
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.progress import Progress, Reporter
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.schedule import Schedule
from adatsq_trt.search.beam import Pruning
from adatsq_trt.search.denoising import DenoisingProblem, format_bits
from adatsq_trt.search.plan import make_plan
from adatsq_trt.search.resume import measure_sensitivity, search_columns
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.solver import State
from adatsq_trt.stages.meter import machine_bytes, resident_bytes
from benchmarks.document import replace_marked

RESULTS = Path(__file__).with_name("flux_dev.json")
BLOCKS, HEADS, HEAD_WIDTH, TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = (19, 38), 24, 128, 512, 4096, 768
FLOAT32, BFLOAT16 = "float32", "bfloat16"
BEAM, CANDIDATES, SLACK, BITS, GUIDANCE, PROJECTIONS = 4, 3, 0.1, 4.0, 3.5, 1
FORMATS = resolve_formats("paper")


def say(progress: Progress) -> None:
    """One line for each unit of work."""
    sys.stderr.write(f"{progress.task}: {progress.done} of {progress.total}\n")


progress = Reporter(say)


@dataclass(frozen=True)
class Search:
    """Model, picture and options of a search.

    Attributes:
        blocks: of two streams and of one; Flux-dev has 19 and 38.
        heads: of 128 numbers; Flux-dev has 24.
        pixels: side of the picture.
        steps: denoising steps.
        precision: of the denoiser calls, as `--search-precision`.
        expansions: of the beam that run per step, as `--expansions`; None for all.
    """

    blocks: tuple[int, int]
    heads: int
    pixels: int
    steps: int
    precision: str
    expansions: int | None


class Row(BaseModel):
    """A search.

    Attributes:
        search: its model, picture and options.
        trajectory_seconds: of the steps in full precision that errors are relative to.
        sweep_seconds: of the sensitivities, with one projection; the default of a search is eight.
        sweep_by_block: whether the backward passes of the sweep went block by block, since the whole would not fit.
        plan_seconds: of the plan; None where the beam's seconds hold it.
        beam_seconds: of the beam.
        beam_calls: denoiser calls of the beam.
        peak_device_bytes: most that PyTorch held on a GPU; None on a processor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: Search
    trajectory_seconds: float
    sweep_seconds: float
    sweep_by_block: bool = False
    plan_seconds: float | None = None
    beam_seconds: float
    beam_calls: int
    peak_device_bytes: int | None

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return self.trajectory_seconds + self.sweep_seconds + (self.plan_seconds or 0.0) + self.beam_seconds


class Results(BaseModel):
    """Content of flux_dev.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    device: str
    torch: str
    rows: tuple[Row, ...]


def make_adapter(device: torch.device, search: Search) -> FluxAdapter:
    """Random weights, one random prompt."""
    torch.manual_seed(0)
    with device:
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=search.blocks[0],
            num_single_layers=search.blocks[1],
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=search.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
    transformer.requires_grad_(False)
    prompts = StoredPrompts(["a"], torch.randn(2, TEXT_TOKENS, TEXT_WIDTH), torch.randn(2, POOLED_WIDTH))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    image = ImageShape(search.pixels // 16, 16, 2, vae=True)
    adapter = FluxAdapter(transformer, prompts, scheduler, image, guidance_distilled=True)
    adapter.trace_module().to(device)  # its buffers too
    adapter.transformer.to(getattr(torch, search.precision))
    return adapter


@torch.no_grad()
def make_store(adapter: FluxAdapter) -> CandidateWeights:
    """Every layer in every format, rounded to nearest, where the model is."""
    layers = adapter.quantizable_layers()
    return CandidateWeights(
        {
            fmt.name: {name: quantize_nearest(layer.weight.float(), fmt) for name, layer in layers.items()}
            for fmt in FORMATS
        },
        {},
    )


def goes_by_block(adapter: FluxAdapter, schedule: Schedule, device: torch.device, search: Search) -> bool:
    """As the search of a run decides it."""
    whole = measure_flow(adapter, schedule, GUIDANCE).backward_bytes(PROJECTIONS)
    free = free_bytes(device) if device.type == CUDA else machine_bytes() - resident_bytes()
    return whole * getattr(torch, search.precision).itemsize // 4 > free


def measure(device: torch.device, search: Search) -> Row:
    """Make the model, search, forget both."""
    if device.type == CUDA:
        torch.cuda.reset_peak_memory_stats(device)
    executor: Executor = InProcess() if device.type == CPU else OnDevice(device)
    executor = Bfloat16(executor, device.type) if search.precision == BFLOAT16 else executor
    adapter, steps = make_adapter(device, search), search.steps
    store, schedule = make_store(adapter), adapter.schedule(steps)
    samples = seeded_samples(adapter, schedule, GUIDANCE, 1, 0, [0])
    by_block = goes_by_block(adapter, schedule, device, search)
    noise = samples.noise()
    began = perf_counter()
    states = [State(noise), *measured_trajectory(executor, executor.share(samples), noise, steps)]
    latents = torch.stack([state.latent for state in states])
    drawn = perf_counter()
    start = projections(1, adapter.latent_shape, PROJECTIONS, 0)
    with tempfile.TemporaryDirectory() as folder:
        with progress("sensitivity", steps) as advance:
            sensitivity, adjoints = measure_sensitivity(
                samples, latents, start, FORMATS, store, Path(folder), advance, executor, by_block
            )
        swept = perf_counter()
        plan = make_plan(sensitivity, format_bits(FORMATS), BITS, CANDIDATES)
        planned = perf_counter()
        with SimulatedModel(adapter, store, 0).installed() as model, progress("beam", steps) as advance:
            simulation = Simulation(model, FORMATS, schedule, GUIDANCE, executor, 1 if device.type == CPU else BEAM)
            problem = DenoisingProblem(samples, simulation, states, adjoints, plan, budget=BITS)
            search_columns(problem, Pruning(BEAM, SLACK, search.expansions), Path(folder), advance)
        ended = perf_counter()
    return Row(
        search=search,
        trajectory_seconds=drawn - began,
        sweep_seconds=swept - drawn,
        sweep_by_block=by_block,
        plan_seconds=planned - swept,
        beam_seconds=ended - planned,
        beam_calls=problem.calls,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == CUDA else None,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    parts = ("trajectory, s", "sweep, s", "plan, s", "beam, s", "sum, s", "calls of the beam")
    names = ("model", "pixels", "steps", "precision", "expansions", *parts)
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    for row in rows:
        search = row.search
        whole = (search.blocks, search.heads) == (BLOCKS, HEADS)
        name = "Flux-dev" if whole else f"{search.blocks[0]} + {search.blocks[1]} blocks, {search.heads} heads"
        how = (search.pixels, search.steps, search.precision, search.expansions or "all")
        seconds = [row.trajectory_seconds, row.sweep_seconds, row.plan_seconds, row.beam_seconds, row.seconds]
        shown = ["in the beam's" if part is None else f"{part:.1f}" for part in seconds]
        lines.append(f"| {' | '.join([name, *map(str, how), *shown, str(row.beam_calls)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write flux_dev.json, print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", default="512:50,1024:10", help="PIXELS:STEPS with commas between")
    parser.add_argument("--blocks", default=",".join(map(str, BLOCKS)))
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--precision", choices=(FLOAT32, BFLOAT16), default=BFLOAT16)
    parser.add_argument("--expansions", type=int, default=4, help="of the beam per step; 0 for all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--from-results", action="store_true", help="measure nothing, take what was measured")
    options = parser.parse_args()
    if not options.from_results:
        search_all(options)
    rows = read_json_model(options.results, Results).rows
    sys.stdout.write(table(rows))
    if options.document is not None:
        replace_marked(options.document, "flux-dev", table(rows))


def search_all(options: argparse.Namespace) -> None:
    """Measure, and write the file after each search."""
    device = parse_device(options.device)
    double, single = map(int, options.blocks.split(","))
    name = torch.cuda.get_device_name(device) if device.type == CUDA else f"{platform.machine()} processor"
    rows: list[Row] = []
    for size in options.sizes.split(","):
        pixels, steps = map(int, size.split(":"))
        search = Search(
            blocks=(double, single),
            heads=options.heads,
            pixels=pixels,
            steps=steps,
            precision=options.precision,
            expansions=options.expansions or None,
        )
        rows.append(measure(device, search))
        write_json_model(options.results, Results(device=name, torch=torch.__version__, rows=tuple(rows)))


if __name__ == "__main__":
    main()

"""Weights once at a mean of 4.0: the searched policy beside uniform w4a4 and the best static policy of the same bytes.

    python -m benchmarks.once.run [--models M ...] [--seeds S ...] [--samples N] [--document D] [--from-results]

Candidates are w4a3 to w4a6, which share one weight, so all policies hold the same bytes, with the same Hessians and
clips. For each model and search seed the policy is searched in runs/bench-once; then it, uniform w4a4 and the static
policy that the search prefers draw the same fresh pictures, on which nothing was chosen. `shapes-flux` is a model that
was kept apart: `benchmarks.once.shapes` trains it there, in minutes. What is measured stays in that folder, so a killed
run goes on. Writes results.json beside this file, where searches of other models and seeds stay, and prints Markdown
tables.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

import adatsq_trt
from adatsq_trt import zoo
from adatsq_trt.calibration.prompt_shares import Use, shared_prompts
from adatsq_trt.files import read_json_model, write_json_model, write_tensors
from adatsq_trt.intervals import Floats, Interval, limits, paired_ratio
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.resume import Score, Scorer
from adatsq_trt.search.select import Point, SearchResult
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.stages import quantize
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.models import open_run
from benchmarks.document import replace_marked
from benchmarks.once import shapes

RUNS, RESULTS = Path("runs/bench-once"), Path(__file__).with_name("results.json")
MODELS = ("digits-flux", shapes.NAME)
FORMATS, BUDGET, UNIFORM, WIDEST = ("w4a3", "w4a4", "w4a5", "w4a6"), 4.0, "w4a4", "w4a6"
PART = 256  # samples that are kept on disk together
WIDEST_SAMPLES = 512  # of the widest format, which shows what the weights' own error leaves
WORST = 0.05  # of the pictures
FRESH, ERRORS = "fresh", "errors.safetensors"  # in the folder of a search: its scores, and those of single pictures


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ratio(_Record):
    """Of errors, with 95 % intervals over paired samples."""

    mean: float
    mean_low: float
    mean_high: float
    geometric: float
    geometric_low: float
    geometric_high: float

    @classmethod
    def of(cls, one: Floats, other: Floats) -> Ratio:
        """Errors of the one in errors of the other, float64 [samples] each."""
        mean, geometric = paired_ratio(one, other), _geometric(one, other)
        return cls(
            mean=mean.value,
            mean_low=mean.low,
            mean_high=mean.high,
            geometric=geometric.value,
            geometric_low=geometric.low,
            geometric_high=geometric.high,
        )


class Row(_Record):
    """One search.

    Attributes:
        model: its name.
        seed: of the search.
        steps: denoising steps.
        samples: fresh pictures.
        kind: where the policy comes from.
        assignments: distinct ones.
        activation_bits: nominal, a mean over steps and layers.
        resident: bytes of quantized weights, in those of the uniform policy.
        error: mean latent MSE.
        uniform_error: of the uniform policy.
        static_kind: where the static policy comes from.
        static_error: its own.
        to_uniform, to_static: ratios of the error.
        worst: policy → share of its mean that the twentieth of the pictures with its largest errors has.
        calm: ratio to the uniform policy without the twentieth of the pictures that either errs most on.
        widest: ratio of the uniform policy with the widest activations to the uniform one.
    """

    model: str
    seed: int
    steps: int
    samples: int
    kind: str
    assignments: int
    activation_bits: float
    resident: float
    error: float
    uniform_error: float
    static_kind: str
    static_error: float
    to_uniform: Ratio
    to_static: Ratio
    worst: dict[str, float]
    calm: Ratio
    widest: Ratio


class Results(_Record):
    """The content of results.json."""

    schema_version: Literal[2] = 2
    torch: str
    rows: tuple[Row, ...]


def measure(model: str, seed: int, samples: int) -> Row:
    """Search a policy, then draw fresh pictures with it and what it is compared with."""
    folder = RUNS / model / f"seed-{seed}"
    found = adatsq_trt.search_policy(
        model, formats=",".join(FORMATS), budget_bits=BUDGET, seed=seed, held_out_samples=1, output=folder, device="cpu"
    )
    result = found.result
    chosen, static = result.points[result.chosen], _static(result)
    own, widest = (next(point for point in result.points if point.name == name) for name in (UNIFORM, WIDEST))
    context = open_run(folder)
    policies = {"searched": chosen, "static": static, UNIFORM: own}
    errors = fresh_errors(context, policies, samples, folder / FRESH)
    errors |= fresh_errors(context, {WIDEST: widest}, min(samples, WIDEST_SAMPLES), folder / FRESH)
    write_tensors(folder / ERRORS, {name: torch.from_numpy(values) for name, values in errors.items()})
    searched, other, uniform, weights = errors.values()
    calm = np.argsort(np.maximum(searched, uniform))[: len(searched) - _worst_count(len(searched))]
    return Row(
        model=model,
        seed=seed,
        steps=context.settings.steps,
        samples=samples,
        kind=chosen.kind,
        assignments=chosen.assignments,
        activation_bits=2 * chosen.mean_bits - context.formats[0].weight_bits,
        resident=chosen.costs.resident_bytes / own.costs.resident_bytes,
        error=float(searched.mean()),
        uniform_error=float(uniform.mean()),
        static_kind=static.kind,
        static_error=float(other.mean()),
        to_uniform=Ratio.of(searched, uniform),
        to_static=Ratio.of(searched, other),
        worst={name: worst_share(values) for name, values in errors.items()},
        calm=Ratio.of(searched[calm], uniform[calm]),
        widest=Ratio.of(weights, uniform[: len(weights)]),
    )


def worst_share(errors: Floats) -> float:
    """Share of a sum of errors [samples] that its largest twentieth has."""
    return float(np.sort(errors)[-_worst_count(len(errors)) :].sum() / errors.sum())


def _worst_count(samples: int) -> int:
    return max(1, round(WORST * samples))


def _static(result: SearchResult) -> Point:
    """The static policy of least error on the selection samples; it holds the same weights."""
    points = [result.points[i] for i in (result.layer_only, result.time_only) if i is not None]
    return min(points, key=lambda point: point.rank_error)


def fresh_errors(context: Context, points: Mapping[str, Point], samples: int, folder: Path) -> dict[str, Floats]:
    """Latent MSE of each policy on fresh pictures, float64 [samples] each; what is measured stays in the folder."""
    index = {fmt.name: i for i, fmt in enumerate(context.formats)}
    prompts = shared_prompts(len(context.adapter.prompts), Use.SCORING)
    policies: list[Rows] = [
        tuple(tuple(index[name] for name in row) for row in point.formats) for point in points.values()
    ]
    fresh = context.evaluation([prompts[i % len(prompts)] for i in range(samples)])
    with context.simulated(quantize.load(context)).installed() as model:
        simulation = Simulation(model, context.formats, context.schedule, context.settings.guidance, context.executor)
        parts = [fresh.part(slice(start, start + PART)) for start in range(0, samples, PART)]
        scores = [list(Scorer(simulation, part, folder).scores(policies)) for part in parts]
    joined = [Score.joined(own).errors for own in zip(*scores, strict=True)]
    return dict(zip(points, joined, strict=True))


def _geometric(one: Floats, other: Floats) -> Interval:
    """Of the ratios of single samples, with the interval of the mean of their logarithm."""
    logs = np.log(one / other)
    draws = np.random.default_rng(0).integers(0, len(logs), (2000, len(logs)))
    low, high = limits(logs[draws].mean(axis=1))
    return Interval(math.exp(float(logs.mean())), math.exp(low), math.exp(high))


def rows(models: list[str], seeds: list[int], samples: int) -> Iterator[Row]:
    """All searches."""
    for model in models:
        with _known(model):
            for seed in seeds:
                row = measure(model, seed, samples)
                sys.stderr.write(f"{model} {seed}: {row.to_uniform.mean:.3f} {row.to_static.mean:.3f}\n")
                yield row


@contextmanager
def _known(model: str) -> Iterator[None]:
    """Have the model that was kept apart found as those of the package are."""
    if model != shapes.NAME:
        yield
        return
    shapes.train_once(RUNS / "models" / model)
    with mock.patch.object(zoo, "ZOO_FOLDER", RUNS / "models"):
        yield


def merged(found: Iterable[Row]) -> Results:
    """These in the place of what results.json has of the same searches."""
    before = read_json_model(RESULTS, Results).rows if RESULTS.is_file() else ()
    every = {(row.model, row.seed): row for row in (*before, *found)}
    ordered = sorted(every.values(), key=lambda row: (MODELS.index(row.model), row.seed))
    return Results(torch=torch.__version__, rows=tuple(ordered))


def table(results: Results) -> str:
    """The results in Markdown."""
    lines = [
        "Means over fresh pictures; ratios with 95 % intervals over pairs; the second row of each search has geometric "
        "means of single pictures' ratios.",
        "",
        "| model, steps | search seed | pictures | won | assignments | activation bits | bytes | latent MSE | "
        "of uniform w4a4 | of the best static |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results.rows:
        static = row.static_kind.replace("_", "-")
        figures = (
            f"{row.model}, {row.steps}",
            str(row.seed),
            f"{row.samples:,}",
            row.kind,
            str(row.assignments),
            f"{row.activation_bits:.2f}",
            f"{row.resident:.2f} ×",
            f"{row.error:.2e}",
            _cell(row.to_uniform.mean, row.to_uniform.mean_low, row.to_uniform.mean_high),
            _cell(row.to_static.mean, row.to_static.mean_low, row.to_static.mean_high) + f", {static}",
        )
        own, other = row.to_uniform, row.to_static
        geometric = (
            *(["", "", "", "geometric mean", "", "", "", ""]),
            _cell(own.geometric, own.geometric_low, own.geometric_high),
            _cell(other.geometric, other.geometric_low, other.geometric_high),
        )
        lines += [f"| {' | '.join(cells)} |" for cells in (figures, geometric)]
    return "\n".join([*lines, "", *_tails(results)]) + "\n"


def _tails(results: Results) -> Iterator[str]:
    """The second table: shares and ratios that say where the means come from."""
    yield (
        "What the means hang on: the share of a mean that its worst twentieth of the pictures has; the searched "
        f"policy's error in uniform {UNIFORM}'s without the twentieth that either errs most on; uniform {WIDEST}'s "
        f"error in {UNIFORM}'s (the first {WIDEST_SAMPLES} pictures), which is about what 4-bit weights leave."
    )
    yield ""
    heads = ("model", "search seed", f"worst 5 % of {UNIFORM}", "of the searched", "of the static", "without", WIDEST)
    yield f"| {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in results.rows:
        shares = (f"{row.worst[name]:.0%}" for name in (UNIFORM, "searched", "static"))
        ratios = (_cell(r.mean, r.mean_low, r.mean_high) for r in (row.calm, row.widest))
        yield f"| {row.model} | {row.seed} | {' | '.join((*shares, *ratios))} |"


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the searches")
    parser.add_argument("--samples", type=int, default=2048, help="fresh pictures")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--from-results", action="store_true", help="print results.json, measure nothing")
    options = parser.parse_args()
    if not options.from_results:
        write_json_model(RESULTS, merged(rows(options.models, options.seeds, options.samples)))
    text = table(read_json_model(RESULTS, Results))
    sys.stdout.write(text)
    if options.document is not None:
        replace_marked(options.document, "once", text)


if __name__ == "__main__":
    main()

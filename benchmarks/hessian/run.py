"""Forms of `--hessian` for GPTQ, all on small models, compared by the error of the same pictures.

    python -m benchmarks.hessian.run [--models M ...] [--seeds N] [--document docs/how-it-works.md] [--from-results]

Calibrates each model once in runs/bench-hessian/MODEL (64 samples) and solves its weights with each form. Measured are
uniform formats and two policies at a mean of 4.0 bits: `weights once` changes activations only, `weights free` weights
too; a search of small effort with plain Hessians finds them, so they favour that form. Every form draws the same
held-out seeds; the errors of 64 at a time are kept there, so a later call with more seeds goes on. Writes results.json
beside this file and prints Markdown tables, which `--document` puts between the markers of that file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import adatsq_trt
from adatsq_trt.calibration.fisher import projections, proportional_weights, temporal_weights
from adatsq_trt.calibration.hessian import layer_moments
from adatsq_trt.calibration.shared_gradients import gradient_sums
from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL, Samples, final_latents
from adatsq_trt.calibration.units import SAMPLES_PER_BACKWARD, Measured
from adatsq_trt.config import HessianForm
from adatsq_trt.files import read_json_model, read_tensors, write_json_model, write_tensors
from adatsq_trt.formats import Format, format_named
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.stages import calibrate, quantize
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.gradients import PROJECTIONS
from adatsq_trt.stages.models import open_run
from benchmarks.document import replace_marked

RUNS, RESULTS = Path("runs/bench-hessian"), Path(__file__).with_name("results.json")
# Denoising steps; None for the model's own. A quarter of scenes-flux-dev's 50 takes a quarter of the hours.
MODELS = {"digits-flux": None, "scenes-flux-schnell": None, "scenes-z-image": None, "scenes-flux-dev": 12}
FORMS: tuple[HessianForm, ...] = ("plain", "paper", "linear", "row", "coherent")
FORMATS = ("int4wo", "w3a16", "w3a5", "w4a4")
POLICIES = {"once": "w4a3,w4a4,w4a5,w4a6", "free": "paper-fine"}  # --weights → --formats
CALIBRATION, MOST_SEEDS, WORST = 64, 1024, 0.05
EFFORT = {"calibration_samples": 16, "selection_samples": 16, "held_out_samples": 1, "projections": 2}
RESAMPLES = 2000


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ratio(_Record):
    """To the plain form, with its 95 % interval over paired seeds."""

    value: float
    low: float
    high: float


class Row(_Record):
    """One form for one format or policy of one model.

    Attributes:
        model: of the zoo.
        steps: denoising steps.
        subject: format or policy.
        form: of `--hessian`.
        seeds: held-out pictures.
        error: mean latent MSE.
        geometric: geometric mean over seeds of the error, as a ratio.
        mean: of the error, likewise.
        worst: mean of the twentieth of the seeds with the largest errors of each form, likewise.
    """

    model: str
    steps: int
    subject: str
    form: str
    seeds: int
    error: float
    geometric: Ratio
    mean: Ratio
    worst: Ratio


class Results(_Record):
    """Content of results.json."""

    schema_version: Literal[1] = 1
    calibration_samples: int
    torch: str
    threads: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Subject:
    """Formats of all steps and layers that are measured together.

    Attributes:
        name: in the table.
        formats: those that it uses.
        at: step → module path → format.
    """

    name: str
    formats: tuple[Format, ...]
    at: Callable[[int], dict[str, Format]]


class Measurement:
    """A model, calibrated once; what was measured stays in its folder."""

    def __init__(self, model: str) -> None:
        """Calibrate, unless that is done."""
        self.folder = RUNS / model
        run = self.folder / "run"
        adatsq_trt.calibrate(
            model,
            formats=",".join(FORMATS),
            simulate=True,
            steps=MODELS[model],
            hessian="coherent",
            calibration_samples=CALIBRATION,
            held_out_samples=MOST_SEEDS,
            device="cpu",
            output=run,
        )
        self.context: Context = open_run(run)
        self.name = model

    def rows(self, seeds: int) -> Iterator[Row]:
        """Every form for every subject."""
        for subject in self._subjects():
            errors = {form: self._errors(subject, form, seeds) for form in FORMS}
            for form, own in errors.items():
                steps = self.context.settings.steps
                sys.stderr.write(f"{self.name} {subject.name} {form} {_geometric(own, errors['plain']).value:.3f}\n")
                yield Row(
                    model=self.name,
                    steps=steps,
                    subject=subject.name,
                    form=form,
                    seeds=seeds,
                    error=float(own.mean()),
                    geometric=_geometric(own, errors["plain"]),
                    mean=_bootstrapped(own, errors["plain"], np.mean),
                    worst=_bootstrapped(own, errors["plain"], _worst),
                )

    def _subjects(self) -> Iterator[Subject]:
        for name in FORMATS:
            fmt = format_named(name)
            formats = dict.fromkeys(self.context.layers, fmt)
            yield Subject(name, (fmt,), partial(_same, formats))
        for weights, formats in POLICIES.items():
            file = self.folder / f"weights-{weights}.json"
            if not file.is_file():
                effort = {**EFFORT, "beam": 1, "candidates": 2, "device": "cpu", "hessian": "plain"}
                asked = {"formats": formats, "weights": weights, "budget_bits": 4.0, "steps": MODELS[self.name]}
                found = adatsq_trt.search_policy(self.name, **asked, **effort)
                found.save(file)
            policy = Policy.load(file)
            used = {f.name: f for step in range(self.context.settings.steps) for f in policy.formats_at(step).values()}
            yield Subject(f"weights {weights}", tuple(used.values()), policy.formats_at)

    def _errors(self, subject: Subject, form: HessianForm, seeds: int) -> np.ndarray:
        """Latent MSE of each held-out picture, float64 [seeds]."""
        folder = self.folder / "errors" / subject.name.replace(" ", "-") / form
        store, found = None, []
        for number, samples in enumerate(self._parts(seeds)):
            file = folder / f"{number:02d}.safetensors"
            if not file.is_file():
                store = store or self._store(subject, form)
                with self.context.simulated(store).installed() as model:
                    latents = final_latents(samples, lambda step: model.assign(subject.at(step), step))
                squares = (latents.double() - self._reference(number, samples).double()).square()
                write_tensors(file, {"errors": squares.flatten(1).mean(dim=1)})
            found.append(read_tensors(file)["errors"].numpy())
        return np.concatenate(found)

    def _parts(self, seeds: int) -> list[Samples]:
        starts = range(0, seeds, SAMPLES_PER_CALL)
        return [self.context.held_out.part(slice(n, min(n + SAMPLES_PER_CALL, seeds))) for n in starts]

    def _reference(self, number: int, samples: Samples) -> Tensor:
        """In full precision."""
        file = self.folder / "reference" / f"{number:02d}.safetensors"
        if not file.is_file():
            write_tensors(file, {"latents": final_latents(samples)})
        return read_tensors(file)["latents"]

    def _store(self, subject: Subject, form: HessianForm) -> CandidateWeights:
        weights: dict[str, Mapping[str, QuantizedWeight]] = {}
        for fmt in subject.formats:
            weights[fmt.name] = quantize.solve(self.context, fmt, self._hessians(form))
        return CandidateWeights(weights, {})

    def _hessians(self, form: HessianForm) -> Mapping[str, Tensor]:
        """Those of the run, or made of its trajectory as the stage would make them."""
        if form == "coherent":
            return calibrate.load_hessians(self.context)
        if form == "plain":
            return calibrate.load_hessians(self.context, calibrate.PLAIN_HESSIANS)
        file = self.folder / "hessians" / f"{form}.safetensors"
        if not file.is_file():
            write_tensors(file, self._row_form if form == "row" else self._by_steps(form))
        return read_tensors(file)

    @cached_property
    def _latents(self) -> Tensor:
        return read_tensors(calibrate.stage(self.context).folder / calibrate.TRAJECTORY)["latents"]

    @property
    def _row_form(self) -> dict[str, Tensor]:
        context = self.context
        start = projections(CALIBRATION, context.adapter.latent_shape, PROJECTIONS, context.settings.seed)
        common = context.executor.share(Measured(context.calibration, extra=False))
        what = (context.executor, common, self._latents, start, context.layers, SAMPLES_PER_BACKWARD)
        first, *others = gradient_sums(*what)
        for part in others:
            for layer, sums in part.items():
                first[layer].add(sums)
        return {layer: sums.row / sums.count for layer, sums in first.items()}

    def _by_steps(self, form: HessianForm) -> dict[str, Tensor]:
        context = self.context
        information = read_tensors(calibrate.stage(context).folder / calibrate.STATISTICS)["information"]
        linear = form == "linear"
        alpha = (
            proportional_weights(information) if linear else temporal_weights(information, context.settings.temperature)
        )
        columns = dict(zip(context.layers, alpha.mT, strict=True))
        batch = context.executor.share(context.calibration)
        moments = layer_moments(context.executor, batch, self._latents, columns, lambda: None)
        return {layer: own.weighted for layer, own in moments.items() if own.weighted is not None}


def _same(formats: dict[str, Format], _step: int) -> dict[str, Format]:
    return formats


def _geometric(errors: np.ndarray, plain: np.ndarray) -> Ratio:
    """With the interval of the mean of a normal logarithm."""
    logs = np.log(errors / plain)
    mean = float(logs.mean())
    half = NormalDist().inv_cdf(0.975) * float(logs.std()) / math.sqrt(len(logs))
    return Ratio(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def _worst(errors: np.ndarray) -> float:
    """Mean of the largest twentieth."""
    return float(np.sort(errors)[-max(1, round(WORST * len(errors))) :].mean())


def _bootstrapped(errors: np.ndarray, plain: np.ndarray, figure: Callable[[np.ndarray], float]) -> Ratio:
    """Of a figure, with its percentile interval over resampled seeds, the same for both."""
    generator, count = np.random.default_rng(0), len(errors)
    draws = [generator.integers(count, size=count) for _ in range(RESAMPLES)]
    ratios = [figure(errors[draw]) / figure(plain[draw]) for draw in draws]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(value=float(figure(errors) / figure(plain)), low=float(low), high=float(high))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=MOST_SEEDS, help="held-out pictures, at most %(default)s")
    parser.add_argument("--document", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument("--from-results", action="store_true", help="print results.json, measure nothing")
    options = parser.parse_args()
    if not options.from_results:
        rows = [row for model in options.models for row in Measurement(model).rows(options.seeds)]
        write_json_model(RESULTS, merged(rows))
    text = tables(read_json_model(RESULTS, Results))
    sys.stdout.write(text)
    if options.document is not None:
        replace_marked(options.document, "hessian", text)


def merged(rows: list[Row]) -> Results:
    """These in the place of what results.json has of the same models."""
    before = read_json_model(RESULTS, Results).rows if RESULTS.is_file() else ()
    measured = {row.model for row in rows}
    every = [*(row for row in before if row.model not in measured), *rows]
    every.sort(key=lambda row: list(MODELS).index(row.model))
    return Results(
        calibration_samples=CALIBRATION,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        rows=tuple(every),
    )


def tables(results: Results) -> str:
    """Geometric means of all forms, then mean and worst errors."""
    columns = [form for form in get_args(HessianForm)[::-1] if form != "plain"]
    lines = [
        f"Geometric mean over seeds of the error, of that with plain Hessians ({results.calibration_samples} "
        "calibration samples, 95 % intervals over paired seeds):",
        "",
        f"| model, steps | seeds | subject | plain, latent MSE | {' | '.join(columns)} |",
        f"|---|---:|---|---:|{'---:|' * len(columns)}",
    ]
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.rows:
        groups.setdefault((row.model, row.subject), {})[row.form] = row
    for (model, subject), forms in groups.items():
        plain = forms["plain"]
        cells = " | ".join(_cell(forms[form].geometric) for form in columns)
        lines.append(f"| {model}, {plain.steps} | {plain.seeds} | {subject} | {plain.error:.2e} | {cells} |")
    heads = " | ".join(f"{form}, {figure}" for form in ("paper", "coherent") for figure in ("mean", "worst 5 %"))
    lines += ["", "Mean error and mean of the worst twentieth, likewise:", "", f"| model | subject | {heads} |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for (model, subject), forms in groups.items():
        cells = " | ".join(f"{_cell(forms[f].mean)} | {_cell(forms[f].worst)}" for f in ("paper", "coherent"))
        lines.append(f"| {model} | {subject} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    main()

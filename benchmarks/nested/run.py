"""Error and bytes of one nested copy of a weight, beside two copies.

    python -m benchmarks.nested.run [--document docs/plugin.md] [--from-results]

Calibrates digits-flux in runs/bench-nested, stores its layers in every way, and measures tr(ΔW H ΔWᵀ) with the run's
Hessians, relative to copies of their own, and the latent MSE of uniform policies. The same errors on synthetic layers,
whose Hessians have eigenvalues i^-p, show what decides them. Writes results.json beside this file and the figure
docs/figures/nested.svg; prints a Markdown table, which `--document` puts between the markers of that file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from math import exp, log
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.nested import (
    LIMIT,
    NARROW,
    WIDE,
    NestedWeight,
    solve_jointly,
    split_rounded,
    weighted_error,
)
from adatsq_trt.calibration.trajectory import final_latents
from adatsq_trt.files import read_json_model, write_bytes, write_json_model
from adatsq_trt.formats import GROUP, Format
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.report.theme import ACCENT, CONTRAST, MUTED, STYLE, Chart, render
from adatsq_trt.stages import calibrate
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.models import open_run
from benchmarks.document import replace_marked

ROOT = Path(__file__).parents[2]
RUN, RESULTS, FIGURES = ROOT / "runs" / "bench-nested", Path(__file__).with_name("results.json"), ROOT / "docs/figures"
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
SAMPLES = 128
DECAYS, ROWS, INPUTS = (0.0, 0.5, 1.0), 256, 1024
COPIES, MIX = "two copies", "per layer"
_SCALE_BYTES = 4  # the kernels read float32
# What is stored once: name, solver, inputs that share a scale of the 8-bit width (None: all of a channel).
_NESTED = (
    ("nested, rounded", split_rounded, None),
    ("nested, jointly", solve_jointly, None),
    ("nested, rounded, group scales", split_rounded, GROUP),
    ("nested, jointly, group scales", solve_jointly, GROUP),
)
SHIPPED = "nested, jointly"
Copies = tuple[QuantizedWeight, QuantizedWeight]  # 4-bit, 8-bit


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerResult(_Record):
    """One layer stored in one way.

    Attributes:
        narrow: error of the 4-bit width, relative to a copy of its own.
        wide: of the 8-bit width.
        bytes: of codes and float32 scales for both widths.
    """

    narrow: float
    wide: float
    bytes: int


class WayResult(_Record):
    """All layers of digits-flux stored in one way.

    Attributes:
        narrow: geometric mean of the layers' relative errors, 4-bit width.
        wide: of the 8-bit width.
        bytes: of all layers.
        nested_layers: how many have one copy.
        layers_within_limit: how many lose at most LIMIT at both widths.
        latent_mse: format → of the uniform policy.
        standard_error: format → of that mean over samples.
    """

    narrow: float
    wide: float
    bytes: int
    nested_layers: int
    layers_within_limit: int
    latent_mse: dict[str, float]
    standard_error: dict[str, float]


class Results(_Record):
    """Everything that is measured.

    Attributes:
        limit: largest relative error at which a layer is nested.
        samples: of the latent MSE, held out.
        ways: way of storing → figures on digits-flux.
        layers: way → module path → figures.
        synthetic: exponent of the eigenvalues' decay → way → figures, rows and inputs as in the file.
    """

    schema_version: Literal[1] = 1
    limit: float
    samples: int
    ways: dict[str, WayResult]
    layers: dict[str, dict[str, LayerResult]]
    synthetic: dict[str, dict[str, LayerResult]]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--from-results", action="store_true", help="draw and print results.json, measure nothing")
    options = parser.parse_args()
    if not options.from_results:
        command = [str(SCRIPT), "calibrate", "digits-flux", "--target", "sm90", "--layout", "plugin"]
        subprocess.run([*command, "--formats", "w4a8,w8a8", "--output", str(RUN)], check=True)
        write_json_model(RESULTS, measure(open_run(RUN)))
    results = read_json_model(RESULTS, Results)
    _draw(results)
    table = _table(results)
    sys.stdout.write(table)
    if options.document is not None:
        replace_marked(options.document, "nested", table)


def measure(context: Context) -> Results:
    """All ways on the run's model, and the solvers on synthetic layers."""
    hessians = calibrate.load_hessians(context)
    weights = {name: linear.weight.detach() for name, linear in context.adapter.quantizable_layers().items()}
    stored: dict[str, dict[str, Copies]] = {}
    layers: dict[str, dict[str, LayerResult]] = {}
    for name, weight in weights.items():
        for way, (copies, result) in _solve(weight, hessians[name]).items():
            stored.setdefault(way, {})[name] = copies
            layers.setdefault(way, {})[name] = result
    _mix(stored, layers)
    samples = context.held_out.part(slice(0, SAMPLES))
    reference = final_latents(samples)
    ways = {}
    for way, copies_of in stored.items():
        store = {
            NARROW.name: {n: c[0] for n, c in copies_of.items()},
            WIDE.name: {n: c[1] for n, c in copies_of.items()},
        }
        errors = {}
        with SimulatedModel(context.adapter, CandidateWeights(store, {})).installed() as model:
            for fmt in (NARROW, WIDE):
                latents = final_latents(samples, _everywhere(model, fmt))
                errors[fmt.name] = (latents.double() - reference.double()).square().flatten(1).mean(1)
        ways[way] = _summary(layers[way], errors)
    synthetic = {str(p): {way: r for way, (_, r) in _solve(*_synthetic(p)).items()} for p in DECAYS}
    return Results(limit=LIMIT, samples=SAMPLES, ways=ways, layers=layers, synthetic=synthetic)


def _everywhere(model: SimulatedModel, fmt: Format) -> Callable[[int], None]:
    formats = dict.fromkeys(model.layers, fmt)
    return lambda step: model.assign(formats, step)


def _solve(weight: Tensor, hessian: Tensor) -> dict[str, tuple[Copies, LayerResult]]:
    """A layer in every way: what each width reads, and what that costs."""
    own = gptq(weight, hessian, NARROW), gptq(weight, hessian, WIDE)
    errors = weighted_error(weight, own[0], NARROW, hessian), weighted_error(weight, own[1], WIDE, hessian)
    solved: dict[str, tuple[Copies, LayerResult]] = {
        COPIES: (own, LayerResult(narrow=1.0, wide=1.0, bytes=_bytes(weight, 1.5, own)))
    }
    for way, solver, group in _NESTED:
        nested: NestedWeight = (
            solver(weight, hessian, errors, group) if solver is solve_jointly else solver(weight, hessian, group)  # type: ignore[operator, arg-type]
        )
        copies = nested.narrow, nested.wide
        solved[way] = (
            copies,
            LayerResult(
                narrow=weighted_error(weight, copies[0], NARROW, hessian) / errors[0],
                wide=weighted_error(weight, copies[1], WIDE, hessian) / errors[1],
                bytes=_bytes(weight, 1.0, copies),
            ),
        )
    return solved


def _bytes(weight: Tensor, per_code: float, copies: Copies) -> int:
    scales = sum(copy.scales.numel() for copy in copies if copy.scales is not None)
    return round(per_code * weight.numel()) + _SCALE_BYTES * scales


def _mix(stored: dict[str, dict[str, Copies]], layers: dict[str, dict[str, LayerResult]]) -> None:
    """Nest where the shipped way stays within the limit, two copies elsewhere: what `quantize` does."""
    chosen = {n: SHIPPED if max(r.narrow, r.wide) <= LIMIT else COPIES for n, r in layers[SHIPPED].items()}
    stored[MIX] = {name: stored[way][name] for name, way in chosen.items()}
    layers[MIX] = {name: layers[way][name] for name, way in chosen.items()}


def _summary(layers: Mapping[str, LayerResult], errors: Mapping[str, Tensor]) -> WayResult:
    rows = list(layers.values())
    return WayResult(
        narrow=exp(sum(log(row.narrow) for row in rows) / len(rows)),
        wide=exp(sum(log(row.wide) for row in rows) / len(rows)),
        bytes=sum(row.bytes for row in rows),
        nested_layers=sum((row.narrow, row.wide) != (1.0, 1.0) for row in rows),
        layers_within_limit=sum(max(row.narrow, row.wide) <= LIMIT for row in rows),
        latent_mse={name: float(error.mean()) for name, error in errors.items()},
        standard_error={name: float(error.std() / len(error) ** 0.5) for name, error in errors.items()},
    )


def _synthetic(decay: float) -> tuple[Tensor, Tensor]:
    """A normal weight [ROWS, INPUTS] and a Hessian with eigenvalues i^-decay in random directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, INPUTS, generator=generator) / INPUTS**0.5
    directions = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator).double())[0]
    eigenvalues = torch.arange(1, INPUTS + 1).double() ** -decay
    return weight, ((directions * eigenvalues) @ directions.T).float()


def _draw(results: Results) -> None:
    """A row for each way, the lightest first: relative errors of both widths; digits-flux."""
    largest = results.ways[COPIES].bytes
    ways = sorted(results.ways.items(), key=lambda item: (item[1].bytes, item[0]))
    rows, narrow, wide = range(len(ways)), [w.narrow for _, w in ways], [w.wide for _, w in ways]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.hlines(rows, [*map(min, narrow, wide)], [*map(max, narrow, wide)], MUTED, linewidth=0.8)
        axes.scatter(narrow, rows, 26, ACCENT, marker="o", label="4 bits", zorder=3)
        axes.scatter(wide, rows, 26, CONTRAST, marker="s", label="8 bits", zorder=3)
        axes.axvline(LIMIT, color=MUTED, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlim=(0.85, 14), xlabel="error, of two copies", ylim=(len(ways) - 0.5, -0.5))
        axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        axes.set_xticks([], minor=True)
        axes.set_yticks(rows, [f"{name}: {way.bytes / largest:.2f} × the bytes" for name, way in ways])
        axes.legend(frameon=False, loc="lower right")
        caption = f"Geometric mean over the layers of digits-flux; dashed: the limit of {LIMIT:g}."
        drawn = render(Chart("nested", "One copy for two widths: error against bytes", caption, figure))
    for kind, content in (("svg", drawn.svg), ("png", drawn.png)):
        write_bytes(FIGURES / f"nested.{kind}", content)


def _table(results: Results) -> str:
    lines = [
        "| storage | bytes | 4-bit error | 8-bit error | within the limit | latent MSE w4a8 | latent MSE w8a8 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    largest, count = results.ways[COPIES].bytes, len(results.layers[COPIES])
    for name, way in results.ways.items():
        mse = [f"{way.latent_mse[f.name]:.2e} ± {way.standard_error[f.name]:.0e}" for f in (NARROW, WIDE)]
        lines.append(
            f"| {name} | {way.bytes / largest:.2f} × | {way.narrow:.2f} × | {way.wide:.2f} × | "
            f"{way.layers_within_limit} of {count} | {mse[0]} | {mse[1]} |"
        )
    lines += ["", f"| synthetic, {ROWS} × {INPUTS} | storage | 4-bit error | 8-bit error |", "|---|---|---:|---:|"]
    for decay, ways in results.synthetic.items():
        for name in ("nested, rounded", SHIPPED, "nested, jointly, group scales"):
            lines.append(f"| eigenvalues i^-{decay} | {name} | {ways[name].narrow:.2f} × | {ways[name].wide:.2f} × |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

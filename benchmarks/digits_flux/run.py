"""Evaluation of the method on `digits-flux`: four builds, and what the solver's Hessians add to each.

    python -m benchmarks.digits_flux.run [--document docs/quality.md]

Builds in runs/bench-* through the console script, reusing what is finished there. Writes results.json beside this file
and prints a Markdown table; `--document` puts it between the markers of that file. Only seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.report.summary import StaticErrors, Summary
from benchmarks.document import replace_marked
from benchmarks.equal_cost import uniform_error

SCRIPT = Path(sys.executable).with_name("adatsq-trt")
RESULTS = Path(__file__).with_name("results.json")
HELD_OUT_SAMPLES = 1024  # twice the default
WEIGHTED, UNWEIGHTED = "GPTQ, Fisher-weighted Hessian", "GPTQ, unweighted Hessian"


@dataclass(frozen=True)
class Case:
    """One build.

    Attributes:
        name: of its run directory.
        options: of `build engine`.
        uniform: the uniform policy that it is compared with.
        solvers: whether the weights' solvers are compared too, which takes minutes.
    """

    name: str
    options: tuple[str, ...]
    uniform: str
    solvers: bool = False


FREE = ("--weights", "free", "--beam", "4")  # formats change weights and activations together

CASES = (
    Case("paper-fine-4", ("--formats", "paper-fine", "--budget-bits", "4", "--simulate", *FREE), "w4a4", solvers=True),
    Case("paper-fine-3.5", ("--formats", "paper-fine", "--budget-bits", "3.5", "--simulate", *FREE), "w3a3"),
    Case("paper-4", ("--formats", "paper", "--budget-bits", "4", "--simulate", *FREE), "w4a4"),
    Case("blackwell-6", ("--formats", "nvfp4,fp8,bf16", "--budget-bits", "6", "--target", "sm120", *FREE), "nvfp4"),
)


class Result(BaseModel):
    """The figures of one build; errors are latent MSE against full precision on the held-out samples.

    Attributes:
        uniform: the uniform policy of the first ratio.
        uniform_errors: format → error of that format everywhere.
        static_errors: of the best policies that do not see the step, or the layer.
        final_standard_error: of that mean.
        solver_errors: "policy" (the chosen one) or "uniform FORMAT" → solver of the weights → error; empty where
            solvers were not compared.
        resident_bits: resident bytes of quantized weights, as bits per weight.
        activation_bits: with dynamic scales, weighted by multiply-accumulates.
        engines: plans, or graphs of the processor.
        ms: per sample, by a roofline; None where nobody knows.
        ratio_to_uniform: final error / that of `uniform`, whose bytes and time are others.
        ratio_at_equal_bytes: final error / what uniform formats have at equal resident bytes (`benchmarks.equal_cost`).
        ratio_at_equal_activations: the same at equal activation bits.
        ratio_to_static: final error / that of the better static policy.
        ratio_to_unweighted: Fisher-weighted / unweighted Hessians, with the same policy; None likewise.
        search_seconds: wall-clock seconds of the search stage; depends on the machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    command: str
    mean_bits: float
    final_error: float
    final_standard_error: float
    uniform: str
    uniform_errors: dict[str, float]
    static_errors: StaticErrors
    solver_errors: dict[str, dict[str, float]]
    resident_bits: float
    activation_bits: float
    engines: int
    ms: float | None
    ratio_to_uniform: float
    ratio_at_equal_bytes: float
    ratio_at_equal_activations: float
    ratio_to_static: float
    ratio_to_unweighted: float | None
    held_out_samples: int
    denoiser_calls: int
    search_seconds: float


class Results(BaseModel):
    """Content of results.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    results: tuple[Result, ...]


def measure(case: Case, runs: Path) -> Result:
    """Build a case, or reuse what is there, and read its figures."""
    run = runs / f"bench-{case.name}"
    samples = ("--held-out-samples", str(HELD_OUT_SAMPLES))
    arguments = ["build", "engine", "digits-flux", *case.options, *samples, "--output", str(run)]
    subprocess.run([SCRIPT, *arguments], check=True)
    summary = read_json_model(run / "summary.json", Summary)
    solvers = _solver_errors(run) if case.solvers else {}
    static = [e for e in (summary.static_errors.layer_only, summary.static_errors.time_only) if e is not None]
    chosen, error = summary.policies[0], summary.final_error
    uniform = [policy for policy in summary.policies if policy.kind == "uniform"]
    by_bytes = uniform_error(chosen.resident_bits, [(p.resident_bits, p.error) for p in uniform])
    by_activations = uniform_error(chosen.costs.activation_bits, [(p.costs.activation_bits, p.error) for p in uniform])
    return Result(
        name=case.name,
        command=" ".join(["adatsq-trt", *arguments]),
        mean_bits=summary.mean_bits,
        final_error=error,
        final_standard_error=summary.final_standard_error,
        uniform=case.uniform,
        uniform_errors=summary.uniform_errors,
        static_errors=summary.static_errors,
        solver_errors=solvers,
        resident_bits=chosen.resident_bits,
        activation_bits=chosen.costs.activation_bits,
        engines=summary.engines,
        ms=summary.ms,
        ratio_to_uniform=error / summary.uniform_errors[case.uniform],
        ratio_at_equal_bytes=error / by_bytes,
        ratio_at_equal_activations=error / by_activations,
        ratio_to_static=error / min(static),
        ratio_to_unweighted=solvers["policy"][WEIGHTED] / solvers["policy"][UNWEIGHTED] if solvers else None,
        held_out_samples=summary.held_out_samples,
        denoiser_calls=summary.denoiser_calls,
        search_seconds=summary.stages["search"].seconds,
    )


def _solver_errors(run: Path) -> dict[str, dict[str, float]]:
    compared = subprocess.run([SCRIPT, "compare", str(run), "--json"], check=True, stdout=subprocess.PIPE, text=True)
    errors: dict[str, dict[str, float]] = json.loads(compared.stdout)
    return errors


def table(results: Results) -> str:
    """The results in Markdown."""
    heads = ("build", "mean bits", "resident bits per weight", "activation bits", "engines", "ms", "latent MSE")
    heads = (*heads, "of uniform at equal bytes", "at equal activation bits", "of one uniform", "of the better static")
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    for r in results.results:
        figures = (f"{r.mean_bits:.3f}", f"{r.resident_bits:.2f}", f"{r.activation_bits:.2f}", str(r.engines))
        figures = (
            *figures,
            "" if r.ms is None else f"{r.ms:.4g}",
            f"{r.final_error:.2e} ± {r.final_standard_error:.0e}",
        )
        figures = (*figures, f"{r.ratio_at_equal_bytes:.2f} ×", f"{r.ratio_at_equal_activations:.2f} ×")
        figures = (*figures, f"{r.ratio_to_uniform:.2f} × {r.uniform}", f"{r.ratio_to_static:.2f} ×")
        lines.append(f"| {r.name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the builds of digits-flux.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directories are")
    parser.add_argument("--document", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    results = Results(results=tuple(measure(case, arguments.runs) for case in CASES))
    write_json_model(RESULTS, results)
    print(table(results))
    if arguments.document is not None:
        replace_marked(arguments.document, "digits", table(results))


if __name__ == "__main__":
    main()

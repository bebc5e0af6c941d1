"""Policies that budgets in bits, size and speed choose on one model: whether each is kept, and how the policies differ.

    python -m benchmarks.budgets.run [--document docs/how-to/choose-a-budget.md]

Five searches on digits-flux in runs/bench-budgets, with small effort; calibration and weights are made once. Writes
results.json beside this file and prints a Markdown table, which `--document` puts between the markers of that file.
Ends with an error when a budget is not kept or two of the three single budgets lead to the same policy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.costs import Costs
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.policy import Policy
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import search
from adatsq_trt.stages.models import open_run
from benchmarks.document import replace_marked
from benchmarks.equal_cost import uniform_error

RUN, RESULTS = Path("runs/bench-budgets"), Path(__file__).with_name("results.json")
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
GPU = "rtx-5090"
EFFORT = ("--steps", "10", "--calibration-samples", "8", "--selection-samples", "8", "--held-out-samples", "32")
COMMAND = ("search", "digits-flux", "--target", "sm120", *EFFORT, "--beam", "2", "--candidates", "2")
SINGLE = (
    ("--budget-bits", "6"),
    ("--budget-size", "0.38x"),
    ("--budget-speed", "1.4x", "--gpu", GPU),
)
TOGETHER = (
    ("--budget-bits", "7", "--budget-size", "0.35x", "--max-assignments", "4"),
    ("--budget-bits", "8", "--budget-size", "0.4x", "--budget-speed", "1.4x", "--gpu", GPU, "--max-assignments", "2"),
)


class Chosen(BaseModel):
    """The policy of one request.

    Attributes:
        budget: options.
        kind: origin of the policy.
        mean_bits: mean of nominal bits.
        costs: resident bytes, activation bits, and milliseconds of one sample by the card's roofline.
        resident_bits: resident bytes as bits per quantized weight.
        assignments: distinct ones.
        shares: format → share of all (step, layer).
        error: latent MSE on held-out samples.
        standard_error: of that mean.
        of_uniform_bytes: that error in what uniform formats have at equal resident bytes (`benchmarks.equal_cost`).
        of_uniform_ms: the same at equal milliseconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: str
    kind: str
    mean_bits: float
    costs: Costs
    resident_bits: float
    assignments: int
    shares: dict[str, float]
    error: float
    standard_error: float
    of_uniform_bytes: float
    of_uniform_ms: float


class Results(BaseModel):
    """Content of results.json.

    Attributes:
        alike: two single budgets, by their options → share of (step, layer) with the same format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    command: str
    gpu: str
    chosen: tuple[Chosen, ...]
    alike: dict[str, float]


def rows(policy: Policy) -> list[str]:
    """Format of every (step, layer)."""
    return [name for step in policy.step_assignments for name in policy.assignments[step]]


def choose(options: tuple[str, ...]) -> tuple[Chosen, Policy]:
    """Search with a budget and read what came out.

    Raises:
        MismatchError: the policy does not keep a budget.
    """
    subprocess.run([SCRIPT, *COMMAND, *options, "--output", RUN], check=True)
    context = open_run(RUN)
    folder = search.stage(context).folder
    policy, result = Policy.load(folder / search.POLICY), read_json_model(folder / search.RESULT, SearchResult)
    cells, point = rows(policy), result.points[result.chosen]
    assert point.held_out_error is not None
    assert point.held_out_standard_error is not None
    limit = context.settings.max_assignments
    if not result.limits.kept_by(policy.mean_bits, point.costs) or (limit or point.assignments) < point.assignments:
        raise MismatchError(
            f"{' '.join(options)}: got {point.costs} in {point.assignments} assignments; a budget broke"
        )
    by_bytes, by_ms = _uniforms(result)
    assert point.costs.ms is not None
    chosen = Chosen(
        budget=" ".join(options),
        kind=point.kind,
        mean_bits=policy.mean_bits,
        costs=point.costs,
        resident_bits=8 * point.costs.resident_bytes / result.weights,
        assignments=len(policy.assignments),
        shares={name: count / len(cells) for name, count in sorted(Counter(cells).items())},
        error=point.held_out_error,
        standard_error=point.held_out_standard_error,
        of_uniform_bytes=point.held_out_error / uniform_error(point.costs.resident_bytes, by_bytes),
        of_uniform_ms=point.held_out_error / uniform_error(point.costs.ms, by_ms),
    )
    return chosen, policy


def _uniforms(result: SearchResult) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Resident bytes and error of every uniform format, then milliseconds and error."""
    points = [point for point in result.points if point.kind == "uniform" and point.held_out_error is not None]
    by_bytes = [(float(p.costs.resident_bytes), float(p.held_out_error or 0)) for p in points]
    by_ms = [(float(p.costs.ms or 0), float(p.held_out_error or 0)) for p in points]
    return by_bytes, by_ms


def table(results: Results) -> str:
    """The results in Markdown."""
    heads = ("budget", "resident bytes", "bits per weight", "activation bits", "ms", "mean bits", "engines", "kind")
    heads = (*heads, "formats used", "latent MSE", "of uniform at equal bytes", "at equal ms")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * 6}---|---|{'---:|' * 3}"]
    for row in results.chosen:
        bits = f"{row.mean_bits:.3f}"
        size, ms = f"{row.costs.resident_bytes:,}", f"{row.costs.ms:.5f}"
        marks = {"--budget-bits": bits, "--budget-size": size, "--budget-speed": ms}
        bits, size, ms = (f"**{text}**" if option in row.budget.split() else text for option, text in marks.items())
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items())
        figures = (size, f"{row.resident_bits:.2f}", f"{row.costs.activation_bits:.2f}", ms, bits)
        figures = (*figures, str(row.assignments), row.kind, shares)
        error = f"{row.error:.1e} ± {row.standard_error:.1e}"
        figures = (*figures, error, f"{row.of_uniform_bytes:.2f} ×", f"{row.of_uniform_ms:.2f} ×")
        lines.append(f"| `{row.budget}` | {' | '.join(figures)} |")
    alike = "; ".join(f"{pair}: {share:.0%}" for pair, share in results.alike.items())
    return "\n".join(lines) + f"\n\nSteps and layers with the same format under two single budgets: {alike}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Search with budgets in bits, size and speed.")
    parser.add_argument("--document", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    found = [choose(options) for options in (*SINGLE, *TOGETHER)]
    single = [
        (options[0].removeprefix("--budget-"), rows(policy))
        for options, (_, policy) in zip(SINGLE, found, strict=False)
    ]
    alike = {
        f"{a} and {b}": sum(x == y for x, y in zip(left, right, strict=True)) / len(left)
        for (a, left), (b, right) in combinations(single, 2)
    }
    if max(alike.values()) == 1:
        raise MismatchError(f"two single budgets lead to one policy: {alike}; choose tighter ones")
    command = " ".join(["adatsq-trt", *COMMAND, "BUDGET", "--output", str(RUN)])
    results = Results(command=command, gpu=GPU, chosen=tuple(chosen for chosen, _ in found), alike=alike)
    write_json_model(RESULTS, results)
    print(table(results))
    if arguments.document is not None:
        replace_marked(arguments.document, "budgets", table(results))


if __name__ == "__main__":
    main()

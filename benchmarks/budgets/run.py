"""What budgets in bits, bytes and milliseconds choose on one model: whether each is kept, and how the policies differ.

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

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.policy import Policy, resident_weight_bytes
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import budget, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.models import open_run
from benchmarks.document import replace_marked

RUN, RESULTS = Path("runs/bench-budgets"), Path(__file__).with_name("results.json")
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
GPU = "rtx-5090"
EFFORT = ("--steps", "10", "--calibration-samples", "8", "--selection-samples", "8", "--held-out-samples", "32")
COMMAND = ("search", "digits-flux", "--target", "sm120", *EFFORT, "--beam", "2", "--candidates", "2")
SINGLE = (
    ("--budget-bits", "6"),
    ("--budget-bytes", "300kB"),
    ("--budget-ms", "0.0040", "--gpu", GPU),
)
TOGETHER = (
    ("--budget-bits", "6", "--budget-bytes", "400kB"),
    ("--budget-bits", "7", "--budget-bytes", "500kB", "--budget-ms", "0.0045", "--gpu", GPU),
)


class Chosen(BaseModel):
    """The policy of one request.

    Attributes:
        budget: options.
        mean_bits, bytes, ms: what the policy has of each; milliseconds of one sample, by the card's roofline.
        assignments: distinct ones.
        formats_per_layer: mean number of formats that a layer stores.
        shares: format → share of all (step, layer).
        error: latent MSE on held-out samples.
        standard_error: of that mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: str
    mean_bits: float
    bytes: int
    ms: float
    assignments: int
    formats_per_layer: float
    shares: dict[str, float]
    error: float
    standard_error: float


class Results(BaseModel):
    """What results.json holds.

    Attributes:
        alike: two single budgets, by their options → share of (step, layer) with the same format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
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
    with_times = Context(context.run, context.settings.model_copy(update={"times": GPU}), context.model)
    times = budget.sample_times(with_times)
    assert times is not None
    stored = [len(set(names)) for names in zip(*policy.assignments, strict=True)]
    chosen = Chosen(
        budget=" ".join(options),
        mean_bits=policy.mean_bits,
        bytes=resident_weight_bytes(policy, {shape.name: shape for shape in budget.shapes_of(context)}),
        ms=times.policy_ms(policy),
        assignments=len(policy.assignments),
        formats_per_layer=sum(stored) / len(stored),
        shares={name: count / len(cells) for name, count in sorted(Counter(cells).items())},
        error=point.held_out_error,
        standard_error=point.held_out_standard_error,
    )
    _require_kept(context, chosen)
    return chosen, policy


def _require_kept(context: Context, chosen: Chosen) -> None:
    settings = context.settings
    limits = (
        (settings.budget_bits, chosen.mean_bits),
        (settings.budget_bytes, chosen.bytes),
        (settings.budget_ms, chosen.ms),
    )
    for most, got in limits:
        if most is not None and got > most * (1 + 1e-9):
            raise MismatchError(f"{chosen.budget}: got {got:g}, expected at most {most:g}; the search broke its budget")


def table(results: Results) -> str:
    """The results in Markdown."""
    heads = ("budget", "mean bits", "weight bytes", "ms", "assignments", "formats stored per layer", "formats used")
    lines = [f"| {' | '.join((*heads, 'latent MSE'))} |", f"|---{'|---:' * 5}|---|---:|"]
    for row in results.chosen:
        bits = f"{row.mean_bits:.3f}"
        size, ms = f"{row.bytes:,}", f"{row.ms:.5f}"
        marks = {"--budget-bits": bits, "--budget-bytes": size, "--budget-ms": ms}
        bits, size, ms = (f"**{text}**" if option in row.budget.split() else text for option, text in marks.items())
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items())
        figures = (bits, size, ms, str(row.assignments), f"{row.formats_per_layer:.2f}", shares)
        lines.append(f"| `{row.budget}` | {' | '.join(figures)} | {row.error:.1e} ± {row.standard_error:.1e} |")
    alike = "; ".join(f"{pair}: {share:.0%}" for pair, share in results.alike.items())
    return "\n".join(lines) + f"\n\nSteps and layers with the same format under two single budgets: {alike}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Search with budgets in bits, bytes and milliseconds.")
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

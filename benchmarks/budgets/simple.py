"""Comparison of a search with simple policies of its budgets: models and targets, each with its default budgets.

    python -m benchmarks.budgets.simple [MODEL:TARGET ...] [--document FILE]

A search for each, with small effort, in runs/bench-simple; those whose policies are there already are not repeated.
Writes simple.json beside this file and prints a Markdown table, which `--document` puts between the markers of that
file. Ends with an error when a uniform or static policy that keeps the budgets is no worse in resident bytes, time and
held-out error than the one that was returned, and better in one by its paired interval.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.intervals import Interval
from adatsq_trt.report.summary import PolicyFigures, Replaced, looser
from adatsq_trt.search.dominance import dominates
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.stages import search
from adatsq_trt.stages.summary import policy_figures, replaced
from benchmarks.document import replace_marked

RUNS, RESULTS = Path("runs/bench-simple"), Path(__file__).with_name("simple.json")
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
EFFORT = ("--steps", "8", "--calibration-samples", "8", "--selection-samples", "32", "--held-out-samples", "64")
EFFORT = (*EFFORT, "--beam", "2", "--candidates", "2")
TARGETS = ("sm120", "sm89", "sm80", "plugin", "cpu")
CASES = (*(f"digits-flux:{target}" for target in TARGETS), "scenes-flux-schnell:sm120", "scenes-z-image:sm120")


class Case(BaseModel):
    """A model on a target.

    Attributes:
        model: its name.
        target: as on the command line; "plugin" is layout `plugin` for sm90.
        reference: format that the budgets are a little more than.
        ms_source: source of the milliseconds.
        policies: the returned policy, then what it is compared with.
        replaced: a simple policy that the search's own was no better than.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    target: str
    reference: str | None
    ms_source: str | None
    policies: tuple[PolicyFigures, ...]
    replaced: Replaced | None


class Results(BaseModel):
    """Content of simple.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    command: str
    cases: tuple[Case, ...]


def measure(name: str) -> Case:
    """Search, and read what came out."""
    model, _, target = name.partition(":")
    run = RUNS / f"{model}-{target}"
    machine = ("--target", "sm90", "--layout", "plugin") if target == "plugin" else ("--target", target)
    subprocess.run([SCRIPT, "search", model, *machine, *EFFORT, "--output", run], check=True)
    settings = read_json_model(run / SETTINGS_NAME, Settings)
    result = read_json_model(run / search.NAME / search.RESULT, SearchResult)
    return Case(
        model=model,
        target=target,
        reference=settings.reference,
        ms_source=result.ms_source,
        policies=policy_figures(result, settings.max_assignments),
        replaced=replaced(result),
    )


def simple(case: Case) -> list[PolicyFigures]:
    """Uniform and static policies that keep the budgets."""
    kinds = ("uniform", "layer_only", "time_only")
    return [p for p in case.policies[1:] if p.kind in kinds and p.within_limits]


def require_undominated(case: Case) -> None:
    """Held-out samples are others than those that the rule was applied on, so an interval has to say so.

    Raises:
        MismatchError: names a simple policy that is better.
    """
    chosen = case.policies[0]
    for policy in simple(case):
        if policy.ratio is None:
            continue
        _, low, high = (part - 1 for part in policy.ratio)
        if high < 0 and dominates(policy.costs, chosen.costs, Interval(policy.ratio[0] - 1, low, high)):
            raise MismatchError(f"{case.model}, {case.target}: {policy.name} is better than what was returned")


def table(results: Results) -> str:
    """The results in Markdown."""
    heads = ("model", "target", "budgets a little above", "policy", "kind", "bits per weight", "activation bits")
    heads = (*heads, "ms", "assignments", "latent MSE", "of the returned")
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|---|---|{'---:|' * 6}"]
    for case in results.cases:
        place = [case.model, case.target, f"uniform {case.reference}"]
        best = min(simple(case), key=lambda p: p.error, default=None)
        for policy in [case.policies[0], *([] if best is None else [best])]:
            ratio = "" if policy.ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*policy.ratio)
            figures = [f"{policy.resident_bits:.2f}", f"{policy.costs.activation_bits:.2f}"]
            figures += ["" if policy.costs.ms is None else f"{policy.costs.ms:.4g}", str(policy.assignments)]
            figures += [f"{policy.error:.2e}", "" if policy is case.policies[0] else ratio]
            name = "returned" if policy is case.policies[0] else f"best simple: {policy.name}"
            lines.append(f"| {' | '.join([*place, name, policy.kind, *figures])} |")
            place = ["", "", ""]
    notes = [
        f"- {case.model}, {case.target}: {note}."
        for case in results.cases
        for note in [*([] if case.replaced is None else [case.replaced.sentence]), *looser(case.policies)]
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Search beside simple policies of the same budgets.")
    parser.add_argument("cases", nargs="*", default=CASES, metavar="MODEL:TARGET", help="what is measured")
    parser.add_argument("--document", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    measured = {(case.model, case.target): case for case in map(measure, arguments.cases)}
    for case in measured.values():
        require_undominated(case)
    known = read_json_model(RESULTS, Results).cases if RESULTS.is_file() else ()
    cases = {(case.model, case.target): case for case in known} | measured
    command = " ".join(["adatsq-trt", "search", "MODEL", "--target", "TARGET", *EFFORT])
    results = Results(command=command, cases=tuple(cases.values()))
    write_json_model(RESULTS, results)
    print(table(results))
    if arguments.document is not None:
        replace_marked(arguments.document, "simple", table(results))


if __name__ == "__main__":
    main()

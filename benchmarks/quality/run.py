"""The comparison of quantization methods on all models of the zoo's worlds, and what each part of the method adds.

    python -m benchmarks.quality.run [--quick] [--models NAME ...] [--from-cells] [--document docs/quality.md]

Cells are kept in runs/bench-quality (quick: runs/bench-quality-quick) and reused; an interrupted run goes on. Writes
results.json (a list of cells) and comparisons.json (intervals, differences, ablation) beside this file, figures in
docs/figures, and tables between the markers of the document. `--from-cells` measures nothing and writes what is there.
A quick run measures the models of few steps with few samples and writes into its own folder only.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from adatsq_trt.cli.stages.evaluate import Cell, Effort, Evaluation
from adatsq_trt.cli.stages.quality import Difference, difference, intervals
from adatsq_trt.errors import MismatchError
from adatsq_trt.evaluation.methods import ABLATIONS, BITS, FULL_BITS, FULL_PRECISION, METHODS, Method
from adatsq_trt.evaluation.scores import Interval
from adatsq_trt.files import write_bytes, write_json_model
from adatsq_trt.zoo import zoo_models
from adatsq_trt.zoo.loading import load_model
from benchmarks.quality.figures import draw
from benchmarks.quality.tables import tables

ROOT = Path(__file__).parents[2]
RUNS, QUICK_RUNS = ROOT / "runs" / "bench-quality", ROOT / "runs" / "bench-quality-quick"
FIGURES = ROOT / "docs" / "figures"
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
OURS = ("adatsq", "adatsq-fine", "adatsq-best")
ABLATED = "scenes-flux-schnell"
FEW_STEPS = 10


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        samples: pictures of a cell.
        calibration: trajectories that methods are calibrated on.
        selection: trajectories that decide between policies.
    """

    samples: int
    calibration: int
    selection: int


QUICK, FULL, MANY_STEPS = Sizes(24, 8, 8), Sizes(600, 32, 32), Sizes(600, 16, 16)


class CellInterval(BaseModel):
    """Where a cell's figures may lie: 95 % bootstrap intervals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    bits: str
    score: tuple[float, float] | None
    psnr_db: tuple[float, float] | None


class Comparisons(BaseModel):
    """What comparisons.json holds.

    Attributes:
        efforts: what the cells of each model have in common.
        intervals: of all cells, those of the ablation too.
        differences: our methods less every other one at the same bits, paired.
        ablation: cells of the parts, on one model.
        missing: cells that were not measured, as "model method bits".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    efforts: tuple[Effort, ...]
    intervals: tuple[CellInterval, ...]
    differences: tuple[Difference, ...]
    ablation: tuple[Cell, ...]
    missing: tuple[str, ...]


def wanted(model: str) -> Iterator[tuple[Method, str]]:
    """The cells of a model: full precision first, then the methods, then the ablation where it is made."""
    yield METHODS[FULL_PRECISION], FULL_BITS
    for bits in BITS:
        yield from ((method, bits) for name, method in METHODS.items() if name != FULL_PRECISION)
    if model == ABLATED:
        yield from ((method, bits) for bits in BITS for method in ABLATIONS.values())


def open_evaluation(model: str, runs: Path, quick: bool) -> Evaluation:
    """The evaluation of a model; searches over many steps get fewer trajectories."""
    loaded = load_model(model)
    sizes = QUICK if quick else FULL if loaded.default_steps <= FEW_STEPS else MANY_STEPS
    effort = Effort(
        model=model,
        model_sha256=loaded.model_sha256,
        samples=sizes.samples,
        seed=0,
        steps=loaded.default_steps,
        guidance=loaded.default_guidance,
        calibration_samples=sizes.calibration,
        selection_samples=sizes.selection,
    )
    return Evaluation(runs / model, effort, loaded)


def compare(evaluations: dict[str, Evaluation], measured: dict[str, list[Cell]], missing: list[str]) -> Comparisons:
    """Intervals of all cells; our methods against the others at the same bits."""
    bounds, differences = [], []
    for model, cells in measured.items():
        for cell in cells:
            score, psnr = intervals(evaluations[model], cell)
            bounds.append(
                CellInterval(
                    model=model, method=cell.method, bits=cell.bits, score=_bounds(score), psnr_db=_bounds(psnr)
                )
            )
        rows = [cell for cell in cells if cell.method in METHODS and cell.method != FULL_PRECISION]
        pairs = [(a, b) for a in rows if a.method in OURS for b in rows if a.bits == b.bits and a.method != b.method]
        differences += [difference(evaluations[model], *pair) for pair in pairs]
    ablation = [cell for cells in measured.values() for cell in cells if cell.method in ABLATIONS]
    return Comparisons(
        efforts=tuple(evaluation.effort for evaluation in evaluations.values()),
        intervals=tuple(bounds),
        differences=tuple(differences),
        ablation=tuple(ablation),
        missing=tuple(missing),
    )


def _bounds(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def insert(document: Path, text: str) -> None:
    """Replace what stands between the markers of a file."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise MismatchError(f"'{document}': expected a line '{BEGIN}' and a later line '{END}'; add them")
    write_bytes(document, f"{before}{BEGIN}\n{text}{END}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantization methods on the models of the zoo.")
    parser.add_argument("--quick", action="store_true", help="few samples, models of few steps")
    parser.add_argument("--models", nargs="+", help="some of the zoo's models")
    parser.add_argument("--from-cells", action="store_true", help="measure nothing, write what was measured")
    parser.add_argument("--document", type=Path, help="Markdown file whose tables are replaced")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = QUICK_RUNS if options.quick else RUNS
    names = options.models or [name for name in zoo_models() if name.startswith("scenes-")]
    evaluations = {name: open_evaluation(name, runs, options.quick) for name in names}
    if options.quick:
        evaluations = {name: e for name, e in evaluations.items() if e.effort.steps <= FEW_STEPS}
    measured: dict[str, list[Cell]] = {}
    missing: list[str] = []
    for name, evaluation in evaluations.items():
        for method, bits in wanted(name):
            if options.from_cells and not evaluation.has(method, bits):
                missing.append(f"{name} {method.name} {bits}")
            else:
                measured.setdefault(name, []).append(evaluation.cell(method, bits))
    write(evaluations, measured, missing, runs if options.quick else Path(__file__).parent, options.document)


def write(
    evaluations: dict[str, Evaluation],
    measured: dict[str, list[Cell]],
    missing: list[str],
    folder: Path,
    document: Path | None,
) -> None:
    """All that is made from cells."""
    comparisons = compare(evaluations, measured, missing)
    cells: Sequence[Cell] = [cell for rows in measured.values() for cell in rows if cell.method in METHODS]
    text = json.dumps([cell.model_dump(mode="json") for cell in cells], indent=2)
    write_bytes(folder / "results.json", f"{text}\n".encode())
    write_json_model(folder / "comparisons.json", comparisons)
    shown = tables(cells, comparisons)
    print(shown)
    if document is not None:
        insert(document, shown)
        draw(evaluations, measured, FIGURES)


if __name__ == "__main__":
    main()

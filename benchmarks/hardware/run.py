"""Methods in the formats that a GPU runs: error beside resident bytes and milliseconds, and ours at each peer's costs.

    python -m benchmarks.hardware.run [--models M ...] [--targets T ...] [--samples N] [--from-cells] [--document D]

Rows are kept in runs/bench-hardware and reused; a killed run goes on. Writes results.json and errors.safetensors
(squared errors of single samples) beside this file after every row, so what is there at any time is a table that says
what is missing. `--samples` other than the default writes into the runs' folder instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from adatsq_trt.errors import BudgetError
from adatsq_trt.files import read_json_model, read_tensors, write_json_model, write_tensors
from adatsq_trt.intervals import Floats
from adatsq_trt.search.costs import CARDS, TARGET_CARDS
from adatsq_trt.zoo.loading import load_model
from benchmarks.document import replace_marked
from benchmarks.hardware.cells import Cells
from benchmarks.hardware.figures import draw
from benchmarks.hardware.methods import FORMATS, methods, wanted
from benchmarks.hardware.rows import Effort, Results, compare, dominated
from benchmarks.hardware.tables import short_table, tables

ROOT = Path(__file__).parents[2]
RUNS, FOLDER = ROOT / "runs" / "bench-hardware", Path(__file__).parent
FIGURES, README = ROOT / "docs" / "figures", ROOT / "README.md"
IN_README = ("scenes-flux-schnell", "sm120")  # the model and the target whose rows are complete
RESULTS, ERRORS = "results.json", "errors.safetensors"
MODELS = ("scenes-flux-schnell", "scenes-flux-dev", "scenes-z-image", "scenes-wan")
# Model → pictures of a row, trajectories for calibration and for choosing, projections: less where a step is dear.
SIZES = {
    "scenes-flux-schnell": (600, 32, 64, 4),
    "scenes-flux-dev": (120, 16, 16, 2),
    "scenes-z-image": (120, 16, 16, 2),
    "scenes-wan": (60, 16, 16, 2),
}


def effort_of(model: str, samples: int | None = None) -> Effort:
    """Settings of a model's rows; with some samples all batches have no more."""
    loaded, sizes = load_model(model), SIZES[model]
    if samples is not None:
        sizes = (samples, *(min(size, samples) for size in sizes[1:3]), 1)
    return Effort(
        model=model,
        model_sha256=loaded.model_sha256,
        steps=loaded.default_steps,
        guidance=loaded.default_guidance,
        samples=sizes[0],
        calibration_samples=sizes[1],
        selection_samples=sizes[2],
        projections=sizes[3],
    )


def collect(cells: Mapping[tuple[str, str], Cells], impossible: Mapping[str, str]) -> tuple[Results, dict[str, Floats]]:
    """All rows that there are, compared; and the errors of their samples by `Row.key`."""
    rows, missing, errors = [], [], {}
    for (model, target), own in cells.items():
        for method in methods(target):
            if own.has(method):
                rows.append(own.read(method))
                errors[rows[-1].key] = own.outcomes(method.name)["errors"]
            elif f"{model} {target} {method.name}" not in impossible:
                missing.append(f"{model} {target} {method.name}")
    efforts = dict.fromkeys(own.effort for own in cells.values())
    results = Results(
        efforts=tuple(effort for effort in efforts if any(row.model == effort.model for row in rows)),
        cards={target: CARDS[TARGET_CARDS[target]].title for target in FORMATS},
        rows=tuple(rows),
        comparisons=compare(rows, errors),
        dominated=dominated(rows, errors),
        missing=tuple(missing),
        impossible=dict(impossible),
    )
    return results, errors


def write(results: Results, errors: Mapping[str, Floats], folder: Path) -> None:
    """Both files."""
    write_json_model(folder / RESULTS, results)
    if errors:
        write_tensors(folder / ERRORS, {key: torch.from_numpy(value).float() for key, value in errors.items()})


def read(folder: Path) -> tuple[Results, dict[str, Floats]]:
    """Both files that `write` wrote."""
    tensors = read_tensors(folder / ERRORS)
    return read_json_model(folder / RESULTS, Results), {key: t.double().numpy() for key, t in tensors.items()}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="those that are measured")
    parser.add_argument("--targets", nargs="+", choices=FORMATS, default=list(FORMATS), help="likewise")
    parser.add_argument("--samples", type=int, help="few of everything, to see that it works")
    parser.add_argument("--from-cells", action="store_true", help="measure nothing, write what was measured")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced, and README's with it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = RUNS if options.samples is None else RUNS.with_name(f"{RUNS.name}-{options.samples}")
    folder = FOLDER if options.samples is None else runs
    efforts = {model: effort_of(model, options.samples) for model in MODELS}
    cells = {(model, target): Cells(runs, efforts[model], target) for model in MODELS for target in FORMATS}
    impossible: dict[str, str] = {}
    if (folder / RESULTS).is_file():
        impossible |= read_json_model(folder / RESULTS, Results).impossible
    for model, target, method in [] if options.from_cells else wanted(options.models, options.targets):
        name = f"{model} {target} {method.name}"
        if cells[model, target].has(method) or name in impossible:
            continue
        try:
            cells[model, target].measure(method)
        except BudgetError as error:
            impossible[name] = str(error)
        write(*collect(cells, impossible), folder)
    results, errors = collect(cells, impossible)
    write(results, errors, folder)
    sys.stdout.write(tables(results))
    if options.document is not None:
        replace_marked(options.document, "hardware", tables(results))
        replace_marked(README, "hardware", short_table(results, *IN_README))
        draw(results, FIGURES)


if __name__ == "__main__":
    main()

"""The comparison of quantization methods on all models of the zoo's worlds, and what each part of the method adds.

    python -m benchmarks.quality.run [--quick] [--models NAME ...] [--from-cells] [--document docs/quality.md]

Cells are kept in runs/bench-quality (quick: runs/bench-quality-quick) and reused; an interrupted run goes on. Writes
results.json (a list of cells) and comparisons.json (intervals, differences, ablation) beside this file, figures in
docs/figures, and tables between the markers of the document. `--from-cells` measures nothing and writes what is there.
`--models` measures some and keeps what the two files say of the others. A quick run measures the models of few steps
with few samples and writes into its own folder only.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from adatsq_trt.evaluation.methods import ABLATIONS, BITS, FULL_BITS, FULL_PRECISION, METHODS, Method
from adatsq_trt.evaluation.scores import Interval
from adatsq_trt.files import read_json_model, write_bytes, write_json_model
from adatsq_trt.stages.evaluate import Cell, Effort, Evaluation
from adatsq_trt.stages.quality import Difference, difference, intervals
from adatsq_trt.zoo import zoo_models
from adatsq_trt.zoo.loading import load_model
from benchmarks.document import replace_marked
from benchmarks.quality.figures import draw
from benchmarks.quality.tables import tables

Row = TypeVar("Row")
ROOT = Path(__file__).parents[2]
RUNS, QUICK_RUNS = ROOT / "runs" / "bench-quality", ROOT / "runs" / "bench-quality-quick"
RESULTS, COMPARISONS = "results.json", "comparisons.json"
FIGURES = ROOT / "docs" / "figures"
OURS = ("adatsq", "adatsq-fine", "adatsq-best")
ABLATED = "scenes-flux-schnell"
FEW_STEPS, QUICK_STEPS = 10, 4


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


QUICK, FULL, MANY_STEPS = Sizes(24, 8, 8), Sizes(600, 32, 64), Sizes(600, 16, 64)
# The parts of the method, with the whole beside them, on fewer samples: PSNR tells them apart.
ABLATION = Sizes(60, 16, 16)
CLIPS = 120  # of a cell


class CellInterval(BaseModel):
    """Where a cell's figures may lie.

    Attributes:
        model: its name.
        method: of the cell.
        bits: of the cell.
        score: 95 % bootstrap interval of the mean score; None without a judge.
        psnr_db: the same of the mean PSNR; None for full precision.
        worst_psnr_db: 5th percentile over samples: samples that became another picture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    bits: str
    score: tuple[float, float] | None
    psnr_db: tuple[float, float] | None
    worst_psnr_db: float | None


class Comparisons(BaseModel):
    """Content of comparisons.json.

    Attributes:
        efforts: settings that the cells of each model share.
        intervals: of all cells in results.json.
        differences: our methods less every other one at the same bits, paired.
        ablation_effort: settings that the cells of the ablation share.
        ablation: those cells.
        ablation_intervals: of those.
        missing: cells that were not measured, as "model method bits".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    efforts: tuple[Effort, ...]
    intervals: tuple[CellInterval, ...]
    differences: tuple[Difference, ...]
    ablation_effort: Effort | None
    ablation: tuple[Cell, ...]
    ablation_intervals: tuple[CellInterval, ...]
    missing: tuple[str, ...]


def wanted(methods: Iterable[Method]) -> Iterator[tuple[Method, str]]:
    """The cells of a model: full precision first."""
    yield METHODS[FULL_PRECISION], FULL_BITS
    for bits in BITS:
        yield from ((method, bits) for method in methods if method.name != FULL_PRECISION)


def open_evaluation(model: str, folder: Path, sizes: Sizes) -> Evaluation:
    """The evaluation of a model, begun or gone on with; clips are more work than pictures."""
    loaded = load_model(model)
    samples = sizes.samples if loaded.adapter.image.frames is None else min(sizes.samples, CLIPS)
    effort = Effort(
        model=model,
        model_sha256=loaded.model_sha256,
        samples=samples,
        seed=0,
        steps=loaded.default_steps,
        guidance=loaded.default_guidance,
        calibration_samples=sizes.calibration,
        selection_samples=sizes.selection,
        prompts="apart",
    )
    return Evaluation(folder, effort, loaded)


@dataclass(frozen=True)
class Results:
    """Both files.

    Attributes:
        cells: of results.json.
        comparisons: of comparisons.json.
    """

    cells: tuple[Cell, ...]
    comparisons: Comparisons

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Those of an earlier run."""
        cells = TypeAdapter(tuple[Cell, ...]).validate_json((folder / RESULTS).read_bytes())
        return cls(cells, read_json_model(folder / COMPARISONS, Comparisons))

    def write(self, folder: Path) -> None:
        """Replace both."""
        text = json.dumps([cell.model_dump(mode="json") for cell in self.cells], indent=2)
        write_bytes(folder / RESULTS, f"{text}\n".encode())
        write_json_model(folder / COMPARISONS, self.comparisons)

    def beside(self, earlier: Results, names: Sequence[str]) -> Results:
        """These, and what an earlier run says of other models, in the order of the names."""
        own = {effort.model for effort in self.comparisons.efforts} | {
            row.split()[0] for row in self.comparisons.missing
        }

        def joined(new: Sequence[Row], old: Sequence[Row], model: Callable[[Row], str]) -> tuple[Row, ...]:
            rows = [*new, *(row for row in old if model(row) not in own)]
            return tuple(sorted(rows, key=lambda row: names.index(model(row))))

        new, old = self.comparisons, earlier.comparisons
        ablated = old if new.ablation_effort is None else new
        comparisons = Comparisons(
            efforts=joined(new.efforts, old.efforts, lambda row: row.model),
            intervals=joined(new.intervals, old.intervals, lambda row: row.model),
            differences=joined(new.differences, old.differences, lambda row: row.model),
            ablation_effort=ablated.ablation_effort,
            ablation=ablated.ablation,
            ablation_intervals=ablated.ablation_intervals,
            missing=joined(new.missing, old.missing, lambda row: row.split()[0]),
        )
        return Results(joined(self.cells, earlier.cells, lambda row: row.model), comparisons)


@dataclass
class Measured:
    """An evaluation and those of its cells that there are.

    Attributes:
        evaluation: of one model.
        cells: in the order of the tables.
        missing: cells that were not measured, as "model method bits".
    """

    evaluation: Evaluation
    cells: list[Cell] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def fill(self, methods: Iterable[Method], only_found: bool) -> None:
        """Measure the cells of these methods, or take those that are there."""
        for method, bits in wanted(methods):
            if only_found and not self.evaluation.has(method, bits):
                self.missing.append(f"{self.evaluation.effort.model} {method.name} {bits}")
            else:
                self.cells.append(self.evaluation.cell(method, bits))

    @property
    def bounds(self) -> list[CellInterval]:
        """Intervals of all cells."""
        return [self._interval(cell) for cell in self.cells]

    def _interval(self, cell: Cell) -> CellInterval:
        score, psnr = intervals(self.evaluation, cell)
        worst = float(np.quantile(self.evaluation.outcomes(cell.method, cell.bits)[1], 0.05))
        return CellInterval(
            model=cell.model,
            method=cell.method,
            bits=cell.bits,
            score=_bounds(score),
            psnr_db=_bounds(psnr),
            worst_psnr_db=None if psnr is None else worst,
        )

    @property
    def differences(self) -> list[Difference]:
        """Our methods, and full precision, less every other one at the same bits."""
        rows = [cell for cell in self.cells if cell.method != FULL_PRECISION]
        pairs = [(a, b) for a in rows if a.method in OURS for b in rows if a.bits == b.bits and a.method != b.method]
        pairs += [(exact, b) for exact in self.cells if exact.method == FULL_PRECISION for b in rows]
        return [difference(self.evaluation, *pair) for pair in pairs]


def _bounds(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantization methods on the models of the zoo.")
    parser.add_argument("--quick", action="store_true", help="few samples, models of few steps, no ablation")
    parser.add_argument("--models", nargs="+", help="some of the zoo's models")
    parser.add_argument("--from-cells", action="store_true", help="measure nothing, write what was measured")
    parser.add_argument("--document", type=Path, help="Markdown file whose tables are replaced")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = QUICK_RUNS if options.quick else RUNS
    names = options.models or [name for name in zoo_models() if name.startswith("scenes-")]
    steps = {name: load_model(name).default_steps for name in names}
    models = []
    for name in names:
        if options.quick and steps[name] > QUICK_STEPS:
            continue
        sizes = QUICK if options.quick else FULL if steps[name] <= FEW_STEPS else MANY_STEPS
        models.append(Measured(open_evaluation(name, runs / name, sizes)))
        models[-1].fill(METHODS.values(), options.from_cells)
    ablation = None
    if not options.quick and ABLATED in names:
        ablation = Measured(open_evaluation(ABLATED, runs / f"{ABLATED}-ablation", ABLATION))
        ablation.fill([*METHODS.values(), *ABLATIONS.values()], options.from_cells)
    folder = runs if options.quick else Path(__file__).parent
    results = Results(tuple(cell for model in models for cell in model.cells), compared(models, ablation))
    if options.models and (folder / RESULTS).is_file():
        results = results.beside(Results.read(folder), list(zoo_models()))
    results.write(folder)
    print(shown := tables(results.cells, results.comparisons))
    if options.document is not None:
        replace_marked(options.document, "quality", shown)
        for model in filter(lambda model: model.cells, models):
            draw(model.evaluation, model.cells, FIGURES)


def compared(models: Sequence[Measured], ablation: Measured | None) -> Comparisons:
    """Compare cells: their intervals, and differences on the same samples."""
    return Comparisons(
        efforts=tuple(model.evaluation.effort for model in models if model.cells),
        intervals=tuple(interval for model in models for interval in model.bounds),
        differences=tuple(row for model in models for row in model.differences),
        ablation_effort=None if ablation is None else ablation.evaluation.effort,
        ablation=() if ablation is None else tuple(ablation.cells),
        ablation_intervals=() if ablation is None else tuple(ablation.bounds),
        missing=tuple(name for model in (*models, *([ablation] if ablation else [])) for name in model.missing),
    )


if __name__ == "__main__":
    main()

"""The tables of the comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adatsq_trt.evaluation.methods import BITS, method_named
from adatsq_trt.evaluation.scores import Interval
from adatsq_trt.stages.evaluate import Cell
from adatsq_trt.stages.quality import verdict

if TYPE_CHECKING:
    from benchmarks.quality.run import CellInterval, Comparisons

# Columns that cells of before they were told do not have: head, field, digits.
_NEWER = (
    ("resident bits", "resident_weight_bits", 2),
    ("activation bits", "activation_bits", 2),
    ("won by", "proposal", 0),
    ("PSNR of the mean MSE, dB", "mean_error_psnr_db", 2),
)
OURS = ("adatsq", "adatsq-fine", "adatsq-best")


def tables(cells: Sequence[Cell], comparisons: Comparisons) -> str:
    """Methods, verdicts, ablation, one below the other."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    parts = [_effort(comparisons)]
    for model in models:
        own = [cell for cell in cells if cell.model == model]
        parts += [f"### {model}\n", _methods(own, comparisons), _verdicts(model, comparisons), _pictures(model, own)]
    if comparisons.ablation:
        parts += ["### What the parts add\n", _ablation(comparisons)]
    return "\n".join(part for part in parts if part)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _effort(comparisons: Comparisons) -> str:
    lines = [
        f"- {e.model}: {e.samples} samples of {e.steps} steps per cell, seed {e.seed}; calibrated on "
        f"{e.calibration_samples} trajectories, policies chosen on {e.selection_samples}."
        for e in comparisons.efforts
    ]
    if comparisons.missing:
        lines.append(f"- Not measured yet: {len(comparisons.missing)} cells.")
    return "\n".join(lines) + "\n"


def _methods(cells: Sequence[Cell], comparisons: Comparisons) -> str:
    columns = list(cells[0].scores)
    told = [head for head, name, _ in _NEWER if any(getattr(cell, name) is not None for cell in cells)]
    head = ["method", "W/A", "weight bits", *told, "mean score", "PSNR, dB", "worst 5 %, dB", *columns]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for cell in cells:
        figures = [
            *(_newer(cell, name, digits) for head, name, digits in _NEWER if head in told),
            *_figures(cell, comparisons.intervals),
            *(f"{cell.scores[c]:.2f}" for c in columns),
        ]
        lines.append(f"| {cell.method} | {cell.bits} | {cell.effective_weight_bits:.2f} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _newer(cell: Cell, name: str, digits: int) -> str:
    value = getattr(cell, name)
    return "" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def _figures(cell: Cell, intervals: Sequence[CellInterval]) -> tuple[str, str, str]:
    """Mean score and PSNR with their intervals; the PSNR that 5 % of the samples fall short of."""
    place = (cell.model, cell.method, cell.bits)
    bounds = next(i for i in intervals if (i.model, i.method, i.bits) == place)
    score = psnr = worst = ""
    if cell.mean_score is not None and bounds.score is not None:
        score = f"{cell.mean_score:.3f} ({bounds.score[0]:.3f} to {bounds.score[1]:.3f})"
    if cell.psnr_db is not None and bounds.psnr_db is not None:
        psnr = f"{cell.psnr_db:.2f} ({bounds.psnr_db[0]:.2f} to {bounds.psnr_db[1]:.2f})"
    if bounds.worst_psnr_db is not None:
        worst = f"{bounds.worst_psnr_db:.1f}"
    return score, psnr, worst


def _pictures(model: str, cells: Sequence[Cell]) -> str:
    """The figures that `figures.draw` makes of these cells."""
    lines = [f"![{model}: PSNR against stored weight bits](figures/quality-{model}-fronts.svg)"]
    if any(cell.method == "adatsq-best" and cell.bits == "4/4" for cell in cells):
        lines += [
            f"![{model}: how sensitive steps and layers are](figures/quality-{model}-sensitivity.svg)",
            f"![{model}: the policy of adatsq-best at 4 bits](figures/quality-{model}-policy.svg)",
        ]
    for bits in BITS:
        if any(cell.bits == bits for cell in cells):
            lines.append(f"![{model}: pictures at {bits}](figures/quality-{model}-{bits.replace('/', '')}.png)")
    return "\n\n".join(lines) + "\n"


def _verdicts(model: str, comparisons: Comparisons) -> str:
    """Our methods less the others; the interval of a tie holds zero."""
    lines = [
        "| method | less | W/A | mean score | | PSNR, dB | |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for d in comparisons.differences:
        if d.model != model or d.other in OURS:
            continue
        score, psnr = _shown(d.score_interval, 3), _shown(d.psnr_interval, 2)
        lines.append(f"| {d.method} | {d.other} | {d.bits} | {score} | {psnr} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _shown(interval: Interval | None, digits: int) -> str:
    """A difference in two columns: the figure with its interval, and the word for it."""
    if interval is None:
        return " | "
    value, low, high = (f"{x:+.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high}) | {verdict(interval)}"


def _ablation(comparisons: Comparisons) -> str:
    """The parts by themselves beside the methods that hold them all, the least PSNR first."""
    effort = comparisons.ablation_effort
    assert effort is not None, "cells have an effort"
    lines = [
        f"{effort.model}, {effort.samples} samples per cell, calibrated on {effort.calibration_samples} trajectories, "
        f"policies chosen on {effort.selection_samples}; the least PSNR first.",
        "",
        "| method | weights | transform | candidates | beam | W/A | weight bits | mean score | PSNR, dB "
        "| worst 5 %, dB |",
        "|---|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for bits in BITS:
        rows = [cell for cell in comparisons.ablation if cell.bits == bits]
        for cell in sorted(rows, key=lambda c: c.psnr_db or 0.0):
            method = method_named(cell.method)
            weights = method.weights.value if method.weights else "modelopt's"
            sets = method.searched[bits] if method.searched else "one format"
            kind = "" if method.kind == "chosen" else f", {method.kind.replace('_', ' ')}"
            beam = str(method.beam) if method.searched and method.kind == "chosen" else ""
            figures = " | ".join(_figures(cell, comparisons.ablation_intervals))
            lines.append(
                f"| {cell.method} | {weights} | {method.transform or ''} | {sets}{kind} | {beam} | {cell.bits} | "
                f"{cell.effective_weight_bits:.2f} | {figures} |"
            )
    return "\n".join(lines) + "\n"

"""Comparison of cells: intervals, differences on the same samples, and the table of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from adatsq_trt.evaluation.methods import FULL_PRECISION
from adatsq_trt.evaluation.scores import bootstrap
from adatsq_trt.intervals import Interval
from adatsq_trt.stages.evaluate import Cell, Evaluation


class Difference(BaseModel):
    """One method less another at the same bits, on the same prompts and seeds.

    Attributes:
        model: its name.
        bits: of both; of the other when the one is full precision.
        method: the one.
        other: the one that is subtracted.
        score: difference of mean scores; None without a judge.
        score_low: 2.5th percentile of the paired bootstrap.
        score_high: 97.5th percentile.
        psnr_db: difference of mean PSNR, None for full precision; the next two likewise.
        psnr_low: 2.5th percentile.
        psnr_high: 97.5th percentile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    bits: str
    method: str
    other: str
    score: float | None
    score_low: float | None
    score_high: float | None
    psnr_db: float | None
    psnr_low: float | None
    psnr_high: float | None

    @property
    def score_interval(self) -> Interval | None:
        """The difference of mean scores."""
        return _interval(self.score, self.score_low, self.score_high)

    @property
    def psnr_interval(self) -> Interval | None:
        """The difference of PSNRs."""
        return _interval(self.psnr_db, self.psnr_low, self.psnr_high)


def _interval(value: float | None, low: float | None, high: float | None) -> Interval | None:
    return None if value is None or low is None or high is None else Interval(value, low, high)


def verdict(difference: Interval) -> str:
    """The word for a difference: better, worse or tie."""
    if difference.is_tie:
        return "tie"
    return "better" if difference.value > 0 else "worse"


def difference(evaluation: Evaluation, one: Cell, other: Cell) -> Difference:
    """`one` less `other`; both measured."""
    (values, psnr), (other_values, other_psnr) = (evaluation.outcomes(c.method, c.bits) for c in (one, other))
    names = evaluation.batch.columns
    score = None if evaluation.batch.judge is None else bootstrap(values - other_values, names)
    decibels = None if one.psnr_db is None or other.psnr_db is None else bootstrap(psnr - other_psnr, names)
    return Difference(
        model=one.model,
        bits=other.bits,
        method=one.method,
        other=other.method,
        score=None if score is None else score.value,
        score_low=None if score is None else score.low,
        score_high=None if score is None else score.high,
        psnr_db=None if decibels is None else decibels.value,
        psnr_low=None if decibels is None else decibels.low,
        psnr_high=None if decibels is None else decibels.high,
    )


def intervals(evaluation: Evaluation, cell: Cell) -> tuple[Interval | None, Interval | None]:
    """Mean score and PSNR of a cell with their bootstrap intervals; None for what it does not have."""
    values, psnr = evaluation.outcomes(cell.method, cell.bits)
    names = evaluation.batch.columns
    return (
        None if evaluation.batch.judge is None else bootstrap(values, names),
        None if cell.method == FULL_PRECISION else bootstrap(psnr, names),
    )


def table(evaluation: Evaluation, cells: Sequence[Cell]) -> Table:
    """The cells in a terminal, with 95 % intervals."""
    heads = ("resident bits", "activation bits", "mean score", "PSNR dB", "of the mean MSE", "worst 5 %", "won by")
    result = Table("method", "bits", *heads, "seconds", box=None)
    for cell in cells:
        score, psnr = intervals(evaluation, cell)
        shown = ["" if i is None else f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (score,)]
        decibels = ["" if i is None else f"{i.value:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in (psnr,)]
        bits = [_number(cell.resident_weight_bits, 2), _number(cell.activation_bits, 2)]
        tail = [_number(cell.mean_error_psnr_db, 2), _number(cell.worst_psnr_db, 1), cell.proposal or ""]
        result.add_row(cell.method, cell.bits, *bits, *shown, *decibels, *tail, f"{cell.seconds:.0f}")
    return result


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

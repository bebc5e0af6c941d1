"""What cells say beside each other: intervals, differences on the same samples, and the table of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from adatsq_trt.cli.stages.evaluate import Cell, Evaluation
from adatsq_trt.evaluation.methods import FULL_PRECISION
from adatsq_trt.evaluation.scores import Interval, bootstrap


class Difference(BaseModel):
    """One method less another at the same bits, on the same prompts and seeds.

    Attributes:
        model: its name.
        bits: of both.
        method: the one.
        other: what is taken away.
        score: difference of mean scores; None without a judge.
        score_low: 2.5th percentile of the paired bootstrap.
        score_high: 97.5th percentile.
        psnr_db: difference of mean PSNR; the next two likewise.
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
    psnr_db: float
    psnr_low: float
    psnr_high: float

    @property
    def score_verdict(self) -> str:
        """Whether the mean scores differ by more than chance."""
        if self.score is None or self.score_low is None or self.score_high is None:
            return "none"
        return verdict(Interval(self.score, self.score_low, self.score_high))

    @property
    def psnr_verdict(self) -> str:
        """Whether the PSNRs differ by more than chance."""
        return verdict(Interval(self.psnr_db, self.psnr_low, self.psnr_high))


def verdict(difference: Interval) -> str:
    """The word for a difference: better, worse or tie."""
    if difference.is_tie:
        return "tie"
    return "better" if difference.value > 0 else "worse"


def difference(evaluation: Evaluation, one: Cell, other: Cell) -> Difference:
    """`one` less `other`; both measured."""
    (right, psnr), (other_right, other_psnr) = (evaluation.outcomes(c.method, c.bits) for c in (one, other))
    names = evaluation.batch.columns
    score = bootstrap(right - other_right, names) if evaluation.batch.judged else None
    decibels = bootstrap(psnr - other_psnr, names)
    return Difference(
        model=one.model,
        bits=one.bits,
        method=one.method,
        other=other.method,
        score=None if score is None else score.value,
        score_low=None if score is None else score.low,
        score_high=None if score is None else score.high,
        psnr_db=decibels.value,
        psnr_low=decibels.low,
        psnr_high=decibels.high,
    )


def intervals(evaluation: Evaluation, cell: Cell) -> tuple[Interval | None, Interval | None]:
    """Mean score and PSNR of a cell with their bootstrap intervals; None for what it does not have."""
    right, psnr = evaluation.outcomes(cell.method, cell.bits)
    names = evaluation.batch.columns
    return (
        bootstrap(right, names) if evaluation.batch.judged else None,
        None if cell.method == FULL_PRECISION else bootstrap(psnr, names),
    )


def table(evaluation: Evaluation, cells: Sequence[Cell]) -> Table:
    """The cells in a terminal, with 95 % intervals."""
    result = Table("method", "bits", "weight bits", "mean score", "PSNR dB", "seconds", box=None)
    for cell in cells:
        score, psnr = intervals(evaluation, cell)
        shown = ["" if i is None else f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (score,)]
        decibels = ["" if i is None else f"{i.value:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in (psnr,)]
        bits = f"{cell.effective_weight_bits:.2f}"
        result.add_row(cell.method, cell.bits, bits, *shown, *decibels, f"{cell.seconds:.0f}")
    return result

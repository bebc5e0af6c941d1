"""Records of the hardware table, and what is compared in it: recomputed from the rows and the errors of single samples.

Ours is what a search chose within a peer's resident bytes and 1.02 of its milliseconds, with at most four engines. A
verdict is the ratio of mean squared errors of the pictures, with its interval over pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from adatsq_trt.intervals import Floats, Interval, paired_difference, paired_ratio

# A peer's milliseconds that ours may take: no policy meets another's to the last digit.
SLACK = 1.02
# Assignments of the searched policy that is compared.
ASSIGNMENTS = 4
Kind = Literal["full", "peer", "ours"]
Verdict = Literal["below", "tie", "above"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Record):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Effort(_Record):
    """Settings that all rows of a model share.

    Attributes:
        model: its name.
        model_sha256: hash of its configurations and weights.
        steps: denoising steps.
        guidance: its scale.
        samples: pictures or clips of a row.
        calibration_samples: trajectories that everything is calibrated on.
        selection_samples: trajectories that decide between policies.
        projections: of the final latent for each calibration sample.
        seed: of all of them.
    """

    model: str
    model_sha256: str
    steps: int
    guidance: float
    samples: int
    calibration_samples: int
    selection_samples: int
    projections: int
    seed: int = 0


class Row(_Record):
    """A method on a model and a target.

    Attributes:
        model: its name.
        target: as on the command line.
        method: its name.
        kind: full precision, another's method, or a search's policy.
        budget_of: the peer whose bytes and milliseconds a search had to keep.
        most_assignments: of a searched policy: its limit.
        origin: of a searched policy: the kind of proposal that won; of others what is to be known of it.
        resident_bytes: of quantized weights and what a method has beside them; each distinct weight grid once.
        resident: the same as a part of 16 bits.
        ms: of one sample, by the roofline of the target's card.
        engines: distinct assignments.
        activation_bits: mean over steps and multiply-accumulates.
        psnr_of_mean_db: PSNR of the mean squared error of the pictures against full precision.
        psnr_db: mean of the samples' PSNR.
        worst_psnr_db: its 5 % quantile over samples.
        score: of the judge; None for a model without one.
        seconds: duration; depends on the machine.
    """

    model: str
    target: str
    method: str
    kind: Kind
    budget_of: str | None = None
    most_assignments: int | None = None
    origin: str | None = None
    resident_bytes: int
    resident: float
    ms: float
    engines: int
    activation_bits: float
    psnr_of_mean_db: Figure
    psnr_db: Figure
    worst_psnr_db: Figure
    score: Figure | None
    seconds: float

    @property
    def key(self) -> str:
        """Name of its errors."""
        return f"{self.model}/{self.target}/{self.method}"


class Comparison(_Record):
    """A peer and the policy that was searched within its bytes and milliseconds.

    Attributes:
        model: its name.
        target: as on the command line.
        peer: a method.
        ours: the searched policy's.
        ratio: of mean squared errors, ours in the peer's.
        psnr_difference_db: of the mean PSNR, ours less the peer's: of most samples, where the mean error is of the few
            that become another picture.
        closer: share of the samples in which ours errs less.
        verdict: where the interval of the ratio lies beside 1.
    """

    model: str
    target: str
    peer: str
    ours: str
    ratio: Figure
    psnr_difference_db: Figure
    closer: float
    verdict: Verdict


class Dominated(_Record):
    """A searched policy that another method beats: no more bytes, no more milliseconds, a smaller error by interval."""

    model: str
    target: str
    ours: str
    by: str


class Results(_Record):
    """Content of results.json.

    Attributes:
        schema_version: of this file.
        efforts: of the models.
        cards: target → card of whose published rates the milliseconds are a roofline.
        rows: that were measured.
        comparisons: of every peer that has one.
        dominated: searched policies that were beaten.
        missing: what was not measured, as "model target method".
        impossible: searches whose budgets no policy keeps, the same way, with the reason.
    """

    schema_version: Literal[1] = 1
    efforts: tuple[Effort, ...]
    cards: dict[str, str]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    dominated: tuple[Dominated, ...]
    missing: tuple[str, ...]
    impossible: dict[str, str] = {}


def within(row: Row, peer: Row) -> bool:
    """Whether a row costs no more than a peer."""
    return row.resident_bytes <= peer.resident_bytes and row.ms <= SLACK * peer.ms


def compare(rows: Sequence[Row], errors: Mapping[str, Floats]) -> tuple[Comparison, ...]:
    """Each peer with the policy that was searched at its costs.

    Args:
        rows: of all models and targets.
        errors: `Row.key` → squared error of every sample, float64 [samples].
    """
    found = []
    for peer in (row for row in rows if row.kind == "peer"):
        same = [row for row in rows if (row.model, row.target) == (peer.model, peer.target)]
        named = {row.method: row for row in same}
        ours = [
            row
            for row in same
            if row.kind == "ours"
            and row.most_assignments == ASSIGNMENTS
            and row.budget_of in named
            and _same_costs(named[row.budget_of], peer)
        ]
        for own in ours[:1]:
            ratio = paired_ratio(errors[own.key], errors[peer.key])
            difference = paired_difference(*(-10 * np.log10(errors[row.key]) for row in (own, peer)))
            verdict: Verdict = "below" if ratio.high < 1 else "above" if ratio.low > 1 else "tie"
            found.append(
                Comparison(
                    model=peer.model,
                    target=peer.target,
                    peer=peer.method,
                    ours=own.method,
                    ratio=_figure(ratio),
                    psnr_difference_db=_figure(difference),
                    closer=float((errors[own.key] < errors[peer.key]).mean()),
                    verdict=verdict,
                )
            )
    return tuple(found)


def _figure(interval: Interval) -> Figure:
    return Figure(value=interval.value, low=interval.low, high=interval.high)


def _same_costs(one: Row, other: Row) -> bool:
    return one.resident_bytes == other.resident_bytes and abs(one.ms - other.ms) <= 1e-9 * other.ms


def dominated(rows: Sequence[Row], errors: Mapping[str, Floats]) -> tuple[Dominated, ...]:
    """Searched policies that a peer beats in bytes, milliseconds and error together. Arguments as of `compare`."""
    return tuple(
        Dominated(model=own.model, target=own.target, ours=own.method, by=peer.method)
        for own in rows
        if own.kind == "ours"
        for peer in rows
        if peer.kind == "peer"
        and (peer.model, peer.target) == (own.model, own.target)
        and peer.resident_bytes <= own.resident_bytes
        and peer.ms <= own.ms
        and paired_ratio(errors[peer.key], errors[own.key]).high < 1
    )

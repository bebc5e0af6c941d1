"""From finished proposals to the policy that is deployed, and to the figures that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.costs import Costs, Limits, TransformCosts
from adatsq_trt.formats import Format, format_named
from adatsq_trt.intervals import LEAST, Floats, paired_difference, paired_ratio
from adatsq_trt.search.active import indices_of, names_of
from adatsq_trt.search.budgets import CostModel
from adatsq_trt.search.pareto import front
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.resume import Score, Scorer

Kind = Literal["beam", "plan", "merged", "layer_only", "time_only", "uniform", "given"]


@dataclass(frozen=True)
class Proposal:
    """A complete policy that is to be judged.

    Attributes:
        kind: its origin.
        rows: format indices per step and layer.
    """

    kind: Kind
    rows: Rows


class Point(BaseModel):
    """A judged policy.

    Attributes:
        kind: its origin.
        name: for uniform policies the format, else kind and number.
        mean_bits: mean of nominal bits.
        costs: resident bytes, activation bits and time.
        selection_error: latent MSE on the screening batch; for the shortlist, on the whole selection batch.
        rank_error: the same with every sample capped (`Score.capped_error`), by which policies are chosen.
        samples: how many these errors are means over.
        held_out_error: latent MSE on the held-out samples, for those policies whose figure is reported.
        held_out_standard_error: of that mean.
        held_out_ratio: that mean over the chosen policy's, with its paired interval; None without one.
        held_out_samples: pairs that the ratio is from (`measure_held_out`); None where none is kept.
        on_front: whether no other point had fewer bits and a smaller error on the screening batch.
        buckets: runs of steps with one assignment.
        formats: step → layer → format name; None where the layer does not run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    name: str
    mean_bits: float
    costs: Costs
    selection_error: float
    rank_error: float
    samples: int
    finalist: bool = False  # Whether it was rescored.
    held_out_error: float | None = None
    held_out_standard_error: float | None = None
    held_out_ratio: tuple[float, float, float] | None = None
    held_out_samples: int | None = None
    on_front: bool = False
    buckets: int
    formats: tuple[tuple[str | None, ...], ...]

    @property
    def assignments(self) -> int:
        """Distinct assignments."""
        return len(set(self.formats))


class Dominated(BaseModel):
    """The search's own choice, beside a simple policy that is no worse in bytes, time and error, and better in one.

    Attributes:
        searched: index of the one.
        by: index of the other.
        ratio: error of the other in errors of the one, on fresh samples.
        low: lower end of its paired interval; None for samples too few to have one.
        high: upper end.
        samples: how many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    searched: int
    by: int
    ratio: float
    low: float | None
    high: float | None
    samples: int


class SearchResult(BaseModel):
    """Result of the search: every judged policy, the chosen one and what finding it cost.

    Attributes:
        schema_version: of this file.
        points: every judged policy; the Pareto front is those with `on_front`.
        weights: number of quantized weights.
        limits: those that the chosen one had to keep.
        ms_source: source of the milliseconds; None where they are not known.
        transform: bytes and milliseconds of the transform in all costs; None where there is none.
        chosen: index of the policy that is deployed.
        dominated: why it is not the search's own choice, or with free weights a warning; None where there is nothing to
            say.
        layer_only: index of the best static policy with one assignment for all steps, None if there is none.
        time_only: index of the best static policy with one format for all layers of a step, None likewise.
        unlimited: index of the policy that would be deployed without a limit on assignments, None if there is no limit.
        denoiser_calls: calls of the transformer during beam search and selection; both guidance branches are one call.
        sensitivity_sweeps: backward passes through the transformer for the screening estimate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    points: tuple[Point, ...]
    weights: int
    limits: Limits
    ms_source: str | None = None
    transform: TransformCosts | None = None
    chosen: int
    dominated: Dominated | None = None
    layer_only: int | None
    time_only: int | None
    unlimited: int | None = None
    denoiser_calls: int
    sensitivity_sweeps: int

    @property
    def searched(self) -> int:
        """Index of the search's own choice."""
        return self.chosen if self.dominated is None else self.dominated.searched


def judge(
    proposals: Sequence[Proposal],
    formats: Sequence[Format],
    costs: CostModel,
    screening: Scorer,
    on_policy: Callable[[], None],
) -> list[Point]:
    """Score whole generated samples of every proposal and mark the Pareto front.

    The same policy may come from several kinds of search; each keeps its point, and the scorer measures it once.

    Args:
        proposals: to be judged.
        formats: those that the proposals index.
        costs: cost model of policies.
        screening: of the first samples.
        on_policy: called after each.
    """
    distinct = list(dict.fromkeys(proposals))
    points, counts = [], dict.fromkeys((p.kind for p in distinct), 0)
    scores = screening.scores([proposal.rows for proposal in distinct])
    for proposal, score in zip(distinct, scores, strict=True):
        number = f"{proposal.kind} {counts[proposal.kind]}"
        name = formats[proposal.rows[0][0]].name if proposal.kind == "uniform" else number
        counts[proposal.kind] += 1
        points.append(_point(proposal, name, formats, costs, score))
        on_policy()
    best = set(front([(p.mean_bits, p.selection_error) for p in points]))
    return [p.model_copy(update={"on_front": i in best}) for i, p in enumerate(points)]


KINDS: tuple[Kind, ...] = ("given", "beam", "plan", "merged", "layer_only", "time_only", "uniform")
# Kinds of search, and how many of each are rescored at most.
_SEATS: tuple[tuple[tuple[Kind, ...], int], ...] = (
    (("beam", "plan", "merged"), 4),
    (("layer_only",), 2),
    (("time_only",), 2),
)


@dataclass(frozen=True)
class Rules:
    """Conditions that a policy must keep to be deployed.

    Attributes:
        within_budget: whether a policy keeps every budget.
        limit: most distinct assignments; None for any number.
    """

    within_budget: Callable[[Point], bool]
    limit: int | None = None

    def eligible(self, points: Sequence[Point]) -> list[list[int]]:
        """Indices of the points that keep the budgets and, first, the limit too; then those that need not."""
        within = [i for i, point in enumerate(points) if self.within_budget(point)]
        if self.limit is None:
            return [within]
        return [[i for i in within if points[i].assignments <= self.limit], within]


def most_seats(limited: bool) -> int:
    """Count the seats of the shortlist; where there is a limit on assignments, those who need not keep it have half."""
    return sum(count // part for _, count in _SEATS for part in ((1, 2) if limited else (1,)))


def shortlist(points: Sequence[Point], rules: Rules, errors: Mapping[int, Floats]) -> list[int]:
    """Choose the points to rescore: of each kind of search the best, and those that are not told from it.

    A handful of samples that flip to another picture decide a mean over a small batch, so what the screening batch does
    not tell from the best of its kind is settled on a larger one, with a cap on what one sample counts; the static
    rivals get the same. Where there is a limit on assignments, those that need not keep it are only told beside the
    others, and have half the seats.

    Args:
        points: judged policies.
        rules: what a policy must keep.
        errors: capped errors on the screening batch of all that keep the budgets, float64 [samples].
    """
    chosen: list[int] = []
    for part, among in enumerate(rules.eligible(points), start=1):
        for kinds, count in _SEATS:
            own = [i for i in among if points[i].kind in kinds]
            chosen += contenders(points, own, errors, count // part) if own else []
    return list(dict.fromkeys(chosen))


def look_again(
    screened: Sequence[Point],
    rules: Rules,
    shortlisted: Sequence[int],
    look: Callable[[Sequence[Point], Sequence[int]], list[Point]],
) -> tuple[list[Point], list[int]]:
    """Rescore the shortlist, then whoever may still beat the best of it.

    Args:
        screened: all points, with their errors on the screening batch.
        rules: conditions that a policy must keep.
        shortlisted: indices of the first to be rescored.
        look: replaces the errors of the points with some indices by those on all samples.

    Returns:
        The points, and the indices of those that were rescored. No point that keeps the rules has a smaller error than
        the best of these.
    """
    points, looked, more = list(screened), list[int](), list(shortlisted)
    while more := more or rivals(screened, points, looked, rules):
        points = look(points, more)
        looked, more = [*looked, *more], []
    return points, looked


def rivals(screened: Sequence[Point], points: Sequence[Point], looked: Sequence[int], rules: Rules) -> list[int]:
    """Choose further points to rescore, since the best so far has not beaten them: their indices.

    The shortlist has the best of each kind, so one that was left out may still beat the winner of all kinds. It is
    beaten when its error on the screening batch is no less than the winner's, on that batch and on all samples.

    Args:
        screened: all points, with their errors on the screening batch.
        points: the same after rescoring.
        looked: indices of those that were rescored.
        rules: conditions that a policy must keep.
    """
    found: list[int] = []
    for among in rules.eligible(points):
        best = _best(points, [i for i in among if i in looked])
        mark = float("inf") if best is None else max(points[best].rank_error, screened[best].rank_error)
        found += [i for i in among if i not in looked and screened[i].rank_error < mark]
    return list(dict.fromkeys(found))


def _ranked(points: Sequence[Point], among: Sequence[int]) -> list[int]:
    """The least capped error first; of equals the fewest buckets."""
    return sorted(among, key=lambda i: (points[i].rank_error, points[i].buckets, i))


def _best(points: Sequence[Point], among: Sequence[int]) -> int | None:
    return next(iter(_ranked(points, among)), None)


def rescore(
    points: Sequence[Point],
    wanted: Sequence[int],
    formats: Sequence[Format],
    scorers: Sequence[Scorer],
    on_policy: Callable[[], None],
) -> list[Point]:
    """Replace the errors of some points by those over several batches.

    Args:
        points: judged policies.
        wanted: indices of the shortlist.
        formats: candidates; the points name their formats.
        scorers: of the batches.
        on_policy: called after each.
    """
    result = list(points)
    for index, score in zip(wanted, scores_of(points, wanted, formats, scorers), strict=True):
        update = {
            "selection_error": score.error,
            "rank_error": score.capped_error,
            "samples": len(score.errors),
            "finalist": True,
        }
        result[index] = points[index].model_copy(update=update)
        on_policy()
    return result


def scores_of(
    points: Sequence[Point], wanted: Sequence[int], formats: Sequence[Format], scorers: Sequence[Scorer]
) -> Iterator[Score]:
    """How some points do on several batches together."""
    policies = [_rows(points[index], formats) for index in wanted]
    for scores in zip(*(scorer.scores(policies) for scorer in scorers), strict=True):
        yield Score.joined(scores)


# Contenders for whom further samples are drawn.
MOST_CONTENDERS = 4


def contenders(
    points: Sequence[Point], among: Sequence[int], errors: Mapping[int, Floats], most: int = MOST_CONTENDERS
) -> list[int]:
    """The best point, and those that the samples do not tell from it: their paired interval holds zero.

    Args:
        points: judged policies.
        among: indices of those that may be chosen, all seen on the same samples.
        errors: capped errors of each, float64 [samples].
        most: of them.
    """
    ranked = _ranked(points, among)
    # The first of several points with one policy.
    first = {points[i].formats: i for i in reversed(ranked)}
    distinct = [i for i in ranked if first[points[i].formats] == i]
    best = errors[distinct[0]]
    near = [i for i in distinct[1:] if paired_difference(errors[i], best).is_tie]
    return [distinct[0], *near][:most]


def _rows(point: Point, formats: Sequence[Format]) -> Rows:
    return indices_of(point.formats, [fmt.name for fmt in formats])


def _point(proposal: Proposal, name: str, formats: Sequence[Format], costs: CostModel, score: Score) -> Point:
    rows = names_of(proposal.rows, [fmt.name for fmt in formats], costs.active)
    entries = [format_named(own).bits for row in rows for own in row if own is not None]
    return Point(
        kind=proposal.kind,
        name=name,
        mean_bits=sum(entries) / len(entries),
        costs=costs.costs(proposal.rows),
        selection_error=score.error,
        rank_error=score.capped_error,
        samples=len(score.errors),
        buckets=1 + sum(a != b for a, b in pairwise(rows)),
        formats=rows,
    )


def best_of(
    points: Sequence[Point], wanted: Sequence[int], kinds: Sequence[Kind], limit: int | None = None
) -> int | None:
    """Index of the least capped error among the wanted points; fewer buckets win a tie.

    Args:
        points: judged policies.
        wanted: indices of those to choose from.
        kinds: of those to choose from.
        limit: most distinct assignments.
    """
    among = [i for i in wanted if points[i].kind in kinds and (limit is None or points[i].assignments <= limit)]
    return _best(points, among)


def measure_held_out(
    points: Sequence[Point],
    wanted: Sequence[int],
    formats: Sequence[Format],
    held_out: Sequence[Scorer],
    within: Callable[[Point], bool],
    on_policy: Callable[[], None],
) -> list[Point]:
    """Add the held-out error to some points.

    The chosen policy and those that keep the budgets are measured on all samples. One beyond them is on the first part,
    and on all where the paired interval of the ratio of the two errors holds 1 there; otherwise its error is that ratio
    times the chosen one's error (a ratio estimate, Cochran 1977, section 12.8): most of what differs between samples is
    common to both.

    Args:
        points: judged policies.
        wanted: indices of those to measure, the chosen one first.
        formats: candidates; the points name their formats.
        held_out: score samples that nothing was chosen on, in parts.
        within: whether a policy keeps the budgets.
        on_policy: called after each.
    """
    result, (first, *others) = list(points), list(dict.fromkeys(wanted))
    (chosen,) = scores_of(points, [first], formats, held_out)
    result[first] = _measured(points[first], chosen, chosen)
    on_policy()
    if not others:
        return result
    early = dict(zip(others, scores_of(points, others, formats, held_out[:1]), strict=True))
    more = held_out[1:]
    near = [i for i in others if more and (within(points[i]) or not _told_apart(early[i], chosen))]
    whole = dict(zip(near, scores_of(points, near, formats, held_out), strict=True))
    for index in others:
        result[index] = _measured(points[index], whole.get(index, early[index]), chosen)
        on_policy()
    return result


def _told_apart(score: Score, chosen: Score) -> bool:
    """Whether the samples of a score tell a policy from the chosen one."""
    ratio = _ratio(score, chosen)
    return ratio is not None and not ratio[1] <= 1 <= ratio[2]


def _measured(point: Point, score: Score, chosen: Score) -> Point:
    """A point with its held-out figures; the chosen policy may have been measured on more samples."""
    samples, error, standard_error = len(score.errors), score.error, score.standard_error
    if samples < len(chosen.errors):
        ratio = score.error / float(chosen.errors[:samples].mean())
        rest = Score(score.errors - ratio * chosen.errors[:samples])
        error, standard_error = ratio * chosen.error, math.hypot(rest.standard_error, ratio * chosen.standard_error)
    update = {
        "held_out_error": error,
        "held_out_standard_error": standard_error,
        "held_out_ratio": _ratio(score, chosen),
        "held_out_samples": samples,
    }
    return point.model_copy(update=update)


def _ratio(one: Score, chosen: Score) -> tuple[float, float, float] | None:
    """On the samples of the one; None where these are too few, or nothing errs."""
    other = chosen.errors[: len(one.errors)]
    if len(other) < LEAST or not other.mean():
        return None
    interval = paired_ratio(one.errors, other)
    return interval.value, interval.low, interval.high

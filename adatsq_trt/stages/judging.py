"""From proposals to the policy that is deployed: screening, rescoring, further samples, simpler rivals, report.

Every batch has seeds of its own: policies are chosen on one, compared with simpler ones on another, and the figures of
the report are from a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.errors import BudgetError
from adatsq_trt.intervals import Floats, paired_difference, paired_ratio
from adatsq_trt.search.active import indices_of
from adatsq_trt.search.dominance import no_costlier, undominated
from adatsq_trt.search.resume import Scorer
from adatsq_trt.search.select import (
    KINDS,
    MOST_CONTENDERS,
    Dominated,
    Kind,
    Point,
    Proposal,
    Rules,
    SearchResult,
    best_of,
    contenders,
    judge,
    look_again,
    measure_held_out,
    most_seats,
    rescore,
    scores_of,
    shortlist,
)
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.settings import Settings
from adatsq_trt.stages.budget import Account
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.work import Work

# Every proposal is judged on the first samples of the selection batch, the shortlist on all.
SCREENING = 64
# While the best policies are not told apart, so many batches of selection samples more are drawn.
FURTHER = 1
# Of the held-out samples, the part that all policies are measured on.
_FIRST_PART = 4
STATIC_KINDS: tuple[Kind, Kind] = ("layer_only", "time_only")
_SIMPLE: tuple[Kind, ...] = ("uniform", *STATIC_KINDS)


def work(settings: Settings, proposals: int, uniforms: int) -> Work:
    """Count what judging takes, with a full shortlist, a tie, a simple rival and nothing measured twice.

    Args:
        settings: of the run.
        proposals: to be judged.
        uniforms: among them.
    """
    selection, held_out, given = settings.selection_samples, settings.held_out_samples, settings.policy is not None
    screened = min(SCREENING, selection)
    seats = 1 if given else min(proposals, most_seats(settings.max_assignments is not None))
    samples = Work(call=selection, rounded=proposals * screened + seats * (selection - screened))
    if not given:
        # Further samples for those that are not told apart, and others for the chosen one beside a simple policy.
        samples += Work(call=(FURTHER + 1) * selection, rounded=(FURTHER * MOST_CONTENDERS + 2) * selection)
    if held_out:
        # The chosen one, that without a limit and the two static ones.
        told = uniforms + (1 if given else 2 + len(STATIC_KINDS))
        samples += Work(call=held_out, rounded=told * (held_out + settings.calibration_samples))
    return Work({unit: settings.steps * count for unit, count in samples.items()})


@dataclass
class Judging:
    """Judge of a search's proposals: the fake-quantized model, the budgets, and the denoiser calls so far.

    Attributes:
        context: of the run.
        simulation: of the fake-quantized model.
        account: costs and budgets.
        folder: of the search.
        calls: denoiser calls so far.
    """

    context: Context
    simulation: Simulation
    account: Account
    folder: Path
    calls: int = 0
    _asked: set[tuple[int, tuple[tuple[str | None, ...], ...]]] = field(default_factory=set)

    def result(self, proposals: Sequence[Proposal]) -> SearchResult:
        """Screen all, rescore the shortlist, choose; report on the held-out samples."""
        context, limit = self.context, self.context.settings.max_assignments
        with context.progress("search: screening", len(set(proposals))) as advance:
            points = judge(proposals, context.formats, self.account.costs, self._selection[0], advance)
        self._count(points, range(len(points)), self._selection[:1])
        given = [i for i, point in enumerate(points) if point.kind == "given"]
        if given:
            return self._reported(self._look(points, given), given[0], None, given)
        within = self._rules.eligible(points)[-1]
        shortlisted = shortlist(points, self._rules, self._capped_errors(points, within, self._selection[:1]))
        points, wanted = look_again(points, self._rules, shortlisted, self._look)
        unlimited = best_of(points, wanted, KINDS)
        among = [i for i in self._rules.eligible(points)[0] if i in wanted]
        if unlimited is None or not among:
            raise BudgetError(
                f"--max-assignments {limit}: no policy with so few distinct assignments was found that keeps all "
                "budgets; raise this limit or a budget"
            )
        points, searched = self._best(points, among)
        dominated = self._dominated(points, searched)
        return self._reported(points, searched, dominated, wanted)

    @cached_property
    def _selection(self) -> list[Scorer]:
        """Of the selection batch: the samples of the screening, and the rest."""
        batch = self.context.selection
        return self._scorers(batch.part(slice(0, SCREENING)), batch.part(slice(SCREENING, None)))

    @cached_property
    def _rules(self) -> Rules:
        def within(point: Point) -> bool:
            return self.account.budgets.holds(indices_of(point.formats, self.context.settings.formats))

        return Rules(within, self.context.settings.max_assignments)

    def _scorers(self, *batches: Samples) -> list[Scorer]:
        return [Scorer(self.simulation, batch, self.folder) for batch in batches if batch.seeds]

    def _count(self, points: Sequence[Point], wanted: Sequence[int], scorers: Sequence[Scorer]) -> None:
        """Calls of the denoiser; a policy is measured once on a batch."""
        asked = {(scorer.samples.seeds[0], points[i].formats) for scorer in scorers for i in wanted}
        self.calls += len(asked - self._asked) * self.context.settings.steps
        self._asked |= asked

    def _look(self, points: Sequence[Point], wanted: Sequence[int]) -> list[Point]:
        """Rescore some points; nothing to do where all samples have been seen."""
        if len(self._selection) == 1:
            return list(points)
        return self._rescored(points, wanted, self._selection)

    def _rescored(self, points: Sequence[Point], wanted: Sequence[int], scorers: Sequence[Scorer]) -> list[Point]:
        self._count(points, wanted, scorers)
        with self.context.progress("search: finalists", len(wanted)) as advance:
            return rescore(points, wanted, self.context.formats, scorers, advance)

    def _best(self, points: list[Point], among: Sequence[int]) -> tuple[list[Point], int]:
        """The point of least error, on further samples as long as it is not told from the next."""
        scorers = list(self._selection)
        for number in range(FURTHER + 1):
            among = contenders(points, among, self._capped_errors(points, among, scorers))
            if len(among) == 1 or number == FURTHER:
                break
            scorers += self._scorers(self.context.further_selection(number))
            points = self._rescored(points, among, scorers)
        return points, among[0]

    def _capped_errors(
        self, points: Sequence[Point], wanted: Sequence[int], scorers: Sequence[Scorer]
    ) -> dict[int, Floats]:
        """Of some points on some batches, float64 [samples]."""
        scores = scores_of(points, wanted, self.context.formats, scorers)
        return {i: score.capped_errors for i, score in zip(wanted, scores, strict=True)}

    def _dominated(self, points: Sequence[Point], searched: int) -> Dominated | None:
        """A simple policy that is no worse than the chosen one in bytes, time and error, if there is one."""
        own = points[searched]
        eligible = [i for i in self._rules.eligible(points)[0] if points[i].kind in _SIMPLE]
        rivals = [i for i in eligible if points[i].formats != own.formats and no_costlier(points[i].costs, own.costs)]
        if not rivals:
            return None
        batch = self.context.comparison
        scorers = self._scorers(batch.part(slice(0, SCREENING)), batch.part(slice(SCREENING, None)))
        errors = self._compared(points, [searched, *rivals], scorers[:1])
        rivals = [i for i in rivals if paired_difference(errors[i], errors[searched]).low <= 0]
        if not rivals:
            return None
        wanted = [searched, *rivals]
        errors = self._compared(points, wanted, scorers)
        winner = undominated(searched, rivals, {i: points[i].costs for i in wanted}, errors)
        if winner == searched:
            return None
        ratio = paired_ratio(errors[winner], errors[searched])
        known = isfinite(ratio.high)
        return Dominated(
            searched=searched,
            by=winner,
            ratio=ratio.value,
            low=ratio.low if known else None,
            high=ratio.high if known else None,
            samples=len(errors[winner]),
        )

    def _compared(self, points: Sequence[Point], wanted: Sequence[int], scorers: Sequence[Scorer]) -> dict[int, Floats]:
        """Errors of some points on some batches, float64 [samples]."""
        self._count(points, wanted, scorers)
        scores = scores_of(points, wanted, self.context.formats, scorers)
        return {i: score.errors for i, score in zip(wanted, scores, strict=True)}

    def _unlimited(self, points: Sequence[Point], chosen: int, wanted: Sequence[int]) -> int | None:
        """Find the choice without a limit on assignments: the same where the limit keeps nothing out."""
        limit = self.context.settings.max_assignments
        if limit is None:
            return None
        best = best_of(points, wanted, KINDS)
        assert best is not None, "one of these was chosen"
        return best if points[best].assignments > limit else chosen

    def _reported(
        self, points: list[Point], searched: int, dominated: Dominated | None, wanted: Sequence[int]
    ) -> SearchResult:
        """The result, with figures of what is told beside the chosen policy on held-out samples."""
        settings = self.context.settings
        once, given = settings.weights == "once", points[searched].kind == "given"
        chosen = dominated.by if dominated is not None and once else searched
        unlimited = None if given else self._unlimited(points, chosen, wanted)
        static = [best_of(points, wanted, (kind,)) for kind in STATIC_KINDS]
        others = [unlimited, *static] if dominated is None else [dominated.searched, dominated.by, unlimited, *static]
        uniforms = [i for i, point in enumerate(points) if point.kind == "uniform"]
        told = list(dict.fromkeys([chosen, *(i for i in others if i is not None), *uniforms]))
        if settings.held_out_samples:
            with self.context.progress("search: held-out samples", len(told)) as advance:
                batch, first = self.context.held_out, max(settings.held_out_samples // _FIRST_PART, SCREENING)
                scorers = self._scorers(batch.part(slice(0, first)), batch.part(slice(first, None)))
                within, formats = self._rules.within_budget, self.context.formats
                points = measure_held_out(points, told, formats, scorers, within, advance)
        return SearchResult(
            points=tuple(points),
            weights=self.account.weights,
            limits=self.account.limits,
            ms_source=self.account.ms_source,
            transform=self.account.transform,
            chosen=chosen,
            dominated=dominated,
            layer_only=static[0],
            time_only=static[1],
            unlimited=unlimited,
            denoiser_calls=self.calls,
            sensitivity_sweeps=0 if given else settings.projections,
        )

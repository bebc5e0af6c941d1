"""From proposals to the deployed policy; the scorer is a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from adatsq_trt.costs import Costs, Limits
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.formats import FORMATS
from adatsq_trt.intervals import Floats
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.budgets import CostModel
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.resume import Score, Scorer
from adatsq_trt.search.select import (
    KINDS,
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
    rescore,
    shortlist,
)

SET = tuple(FORMATS[name] for name in ("w3a3", "w4a4", "w8a8"))
LOW: Rows = ((0, 0), (0, 0))
MIDDLE: Rows = ((1, 1), (1, 1))
MIXED: Rows = ((2, 0), (0, 1))
HIGH: Rows = ((2, 2), (2, 2))
SHAPES = (LayerShape("a", 64, 64, 4), LayerShape("b", 64, 128, 4))
COSTS = CostModel.of(SET, SHAPES, steps=2)
ERRORS = {LOW: 9.0, MIDDLE: 5.0, MIXED: 6.0, HIGH: 1.0}


class Batch(BaseModel):
    seeds: tuple[int, ...]


class Table:
    """A scorer that looks errors up and counts."""

    def __init__(self, errors: dict[Rows, float], samples: int = 3) -> None:
        self.errors, self.asked = errors, list[Rows]()
        self.samples = Batch(seeds=tuple(range(samples)))

    def scores(self, policies: Sequence[Rows]) -> Iterator[Score]:
        for rows in policies:
            self.asked.append(rows)
            yield Score(self.errors[rows] * np.linspace(0.5, 1.5, len(self.samples.seeds)))


def table(errors: dict[Rows, float], samples: int = 3) -> Scorer:
    return cast(Scorer, Table(errors, samples))


def point(
    kind: Kind, bits: float, error: float, buckets: int = 1, formats: tuple[tuple[str, ...], ...] = (("w4a4",),)
) -> Point:
    return Point(
        kind=kind,
        name="",
        mean_bits=bits,
        costs=Costs(resident_bytes=1000, activation_bits=bits),
        selection_error=100.0,
        rank_error=error,
        samples=1,
        buckets=buckets,
        formats=formats,
    )


def everything(_: Point) -> bool:
    return True


def ignore() -> None:
    pass


def test_a_policy_keeps_a_point_for_each_kind_of_search_that_found_it() -> None:
    scorer, done = Table(ERRORS), list[None]()
    proposals = [
        Proposal("beam", MIXED),
        Proposal("plan", MIDDLE),
        Proposal("beam", MIXED),
        Proposal("uniform", MIDDLE),
    ]
    points = judge(proposals, SET, COSTS, cast(Scorer, scorer), lambda: done.append(None))
    assert [(p.kind, p.selection_error) for p in points] == [("beam", 6.0), ("plan", 5.0), ("uniform", 5.0)]
    assert len(done) == 3


def test_a_point_says_what_the_policy_is() -> None:
    points = judge([Proposal("uniform", HIGH), Proposal("beam", MIXED)], SET, COSTS, table(ERRORS), ignore)
    uniform, beam = (next(p for p in points if p.kind == kind) for kind in ("uniform", "beam"))
    assert (uniform.name, uniform.mean_bits, uniform.buckets) == ("w8a8", 8.0, 1)
    assert (beam.name, beam.mean_bits, beam.buckets) == ("beam 0", (8 + 3 + 3 + 4) / 4, 2)
    assert beam.formats == (("w8a8", "w3a3"), ("w3a3", "w4a4"))
    assert beam.held_out_error is None
    # Each weight format once: w8a8 and w3a3 of the first layer, w3a3 and w4a4 of the second.
    stored = (8 + 16 / 64 + 3 + 16 / 64) * 64 * 64 / 8 + (3 + 16 / 64 + 4 + 16 / 64) * 64 * 128 / 8
    assert beam.costs.resident_bytes == stored
    assert uniform.costs.activation_bits == pytest.approx(8 + 32 / 64)
    assert beam.costs.ms is None


def test_the_front_is_marked() -> None:
    kinds: list[Kind] = ["uniform", "uniform", "beam", "uniform"]
    rows = [LOW, MIDDLE, MIXED, HIGH]
    proposals = [Proposal(kind, row) for kind, row in zip(kinds, rows, strict=True)]
    points = judge(proposals, SET, COSTS, table(ERRORS), ignore)
    # MIXED has more bits than MIDDLE and a larger error.
    assert {p.name for p in points if p.on_front} == {"w3a3", "w4a4", "w8a8"}


def test_the_best_is_the_least_error_then_the_fewest_buckets() -> None:
    points = [point("beam", 4, 2.0), point("beam", 4, 1.0, 5), point("plan", 4, 1.0, 3), point("layer_only", 4, 0.5)]
    assert best_of(points, [0, 1, 2, 3], ("beam", "plan")) == 2
    assert best_of(points, [0, 1, 2, 3], ("beam", "plan", "layer_only")) == 3
    assert best_of(points, [0, 1], ("beam", "plan")) == 1
    assert best_of(points, [0, 1, 2, 3], ("time_only",)) is None


def near(points: Sequence[Point]) -> dict[int, Floats]:
    """Errors that no samples tell apart, around those of the points."""
    spread = np.linspace(-1000, 1000, 64)
    return {i: point.rank_error + (spread if i % 2 else spread[::-1]) for i, point in enumerate(points)}


def surely(points: Sequence[Point]) -> dict[int, Floats]:
    """Errors that are the same for all samples."""
    return {i: np.full(64, point.rank_error) for i, point in enumerate(points)}


def numbered(kind: Kind, bits: float, error: float, number: int) -> Point:
    return point(kind, bits, error, formats=((f"format {number}",),))


def test_finalists_keep_the_budget_and_leave_room_for_the_rivals() -> None:
    points = [
        *(numbered("beam", 4, 1.0 + i, i) for i in range(6)),
        numbered("plan", 4.1, 0.1, 6),
        numbered("plan", 4.0, 0.5, 7),
        *(numbered("layer_only", 4, 10.0 + i, 8 + i) for i in range(3)),
        numbered("time_only", 3.9, 20.0, 11),
        numbered("uniform", 4, 0.2, 12),
    ]
    rules = Rules(lambda point: point.mean_bits <= 4.0)
    assert len(shortlist(points, rules, near(points))) == 4 + 2 + 1
    assert set(shortlist(points, rules, near(points))) <= {0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11}
    assert shortlist(points, rules, surely(points)) == [7, 8, 11], "the best of each kind, which the others cannot be"


def test_policies_that_keep_a_limit_have_seats_of_their_own() -> None:
    many, few = (("w4a4",), ("w8a8",), ("w3a3",)), (("w4a4",),) * 3
    points = [point("time_only", 4, 1.0 + i, formats=(*many, (f"format {i}",))) for i in range(3)]
    points += [point("time_only", 4, 10.0, formats=few), point("merged", 4, 11.0, formats=few)]
    assert sorted(shortlist(points, Rules(everything, limit=2), surely(points))) == [0, 3, 4]
    assert sorted(shortlist(points, Rules(everything), surely(points))) == [0, 4]


ERROR = st.integers(1, 6).map(float)  # few values, so that there are ties
JUDGED = st.tuples(st.sampled_from(KINDS[1:]), st.integers(3, 5), ERROR, ERROR, st.integers(1, 4))


@settings(max_examples=300)
@given(st.lists(JUDGED, min_size=1, max_size=24), st.sampled_from([None, 1, 2, 3]))
def test_no_judged_policy_that_keeps_the_rules_beats_the_one_that_is_returned(
    judged: list[tuple[Kind, int, float, float, int]], limit: int | None
) -> None:
    """Points of any kind, with errors on the screening batch and on all samples; a budget of 4 bits."""
    screened = [
        point(kind, bits, first, formats=tuple((f"format {i}",) for i in range(assignments)))
        for kind, bits, first, _, assignments in judged
    ]

    def look(points: Sequence[Point], wanted: Sequence[int]) -> list[Point]:
        assert len(set(wanted)) == len(wanted)
        seen = {i: p.model_copy(update={"rank_error": judged[i][3], "finalist": True}) for i, p in enumerate(points)}
        return [seen[i] if i in wanted else p for i, p in enumerate(points)]

    rules = Rules(lambda p: p.mean_bits <= 4, limit)
    points, looked = look_again(screened, rules, shortlist(screened, rules, surely(screened)), look)
    assert [i for i, p in enumerate(points) if p.finalist] == sorted(looked)
    for most in {limit, None}:
        keeps = [i for i, p in enumerate(points) if p.mean_bits <= 4 and (most is None or p.assignments <= most)]
        best = best_of(points, looked, KINDS, most)
        assert (best is None) == (not keeps)
        for i in keeps if best is not None else ():
            assert best in keeps
            assert points[best].rank_error <= points[i].rank_error
            assert points[i].finalist or screened[best].rank_error <= screened[i].rank_error


def test_the_second_look_is_the_mean_over_all_samples() -> None:
    points = judge([Proposal("beam", MIXED), Proposal("uniform", MIDDLE)], SET, COSTS, table(ERRORS), ignore)
    index = next(i for i, p in enumerate(points) if p.kind == "beam")
    scorers = (table(ERRORS, 3), table({MIXED: 2.0}, 9))
    looked = rescore(points, [index], SET, scorers, ignore)
    assert looked[index].selection_error == pytest.approx((3 * 6.0 + 9 * 2.0) / 12)
    assert (looked[index].samples, looked[index].finalist) == (12, True)
    assert looked[1 - index] == points[1 - index]


def test_held_out_errors_are_measured_for_the_wanted_alone() -> None:
    proposals = [Proposal("uniform", rows) for rows in (LOW, MIDDLE, HIGH)]
    points = judge(proposals, SET, COSTS, table(ERRORS), ignore)
    by_name = {p.name: i for i, p in enumerate(points)}
    scorer = Table({LOW: 90.0, HIGH: 10.0}, 2)
    wanted = [by_name["w8a8"], by_name["w3a3"]]
    result = measure_held_out(points, wanted, SET, [cast(Scorer, scorer)], beyond, ignore)
    got = {p.name: p.held_out_error for p in result}
    assert got == {"w3a3": 90.0, "w4a4": None, "w8a8": 10.0}
    assert {p.name: p.held_out_standard_error for p in result} == {"w3a3": 45.0, "w4a4": None, "w8a8": 5.0}
    assert [p.selection_error for p in result] == [p.selection_error for p in points]


def test_samples_that_tell_a_policy_from_the_chosen_one_suffice() -> None:
    """The error of a policy that was measured on a part is the ratio there, times the error on all samples."""
    points = judge([Proposal("uniform", rows) for rows in (LOW, MIDDLE, HIGH)], SET, COSTS, table(ERRORS), ignore)
    by_name = {p.name: i for i, p in enumerate(points)}
    first, rest = Table({HIGH: 10.0, LOW: 90.0, MIDDLE: 10.0}, 16), Table({HIGH: 30.0, MIDDLE: 30.0}, 48)
    wanted = [by_name[name] for name in ("w8a8", "w3a3", "w4a4")]
    result = measure_held_out(points, wanted, SET, [cast(Scorer, first), cast(Scorer, rest)], beyond, ignore)
    far, tied, chosen = (result[by_name[name]] for name in ("w3a3", "w4a4", "w8a8"))
    assert LOW not in rest.asked
    assert (far.held_out_samples, tied.held_out_samples, chosen.held_out_samples) == (16, 64, 64)
    assert chosen.held_out_error == pytest.approx((16 * 10 + 48 * 30) / 64)
    assert far.held_out_ratio == pytest.approx((9.0, 9.0, 9.0))
    assert far.held_out_error == pytest.approx(9 * chosen.held_out_error)
    assert far.held_out_standard_error == pytest.approx(9 * chosen.held_out_standard_error)
    assert tied.held_out_error == chosen.held_out_error


def test_a_policy_within_the_budgets_is_measured_on_all_samples() -> None:
    points = judge([Proposal("uniform", rows) for rows in (LOW, HIGH)], SET, COSTS, table(ERRORS), ignore)
    batches = [cast(Scorer, Table({HIGH: 10.0, LOW: 90.0}, 16)), cast(Scorer, Table({HIGH: 30.0, LOW: 90.0}, 48))]
    wanted = sorted(range(2), key=lambda i: points[i].name, reverse=True)
    _, low = (measure_held_out(points, wanted, SET, batches, lambda _: True, ignore)[i] for i in wanted)
    assert (low.name, low.held_out_samples, low.held_out_error) == ("w3a3", 64, 90.0)


def beyond(_point: Point) -> bool:
    return False


def test_a_result_survives_the_disk(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "weights": 64 * 64,
        "limits": Limits(bits=4.0),
        "chosen": 0,
        "layer_only": None,
        "time_only": 1,
        "denoiser_calls": 7,
        "sensitivity_sweeps": 8,
    }
    result = SearchResult(points=(point("beam", 4, 0.1), point("time_only", 4, 0.2)), **fields)
    write_json_model(tmp_path / "result.json", result)
    assert read_json_model(tmp_path / "result.json", SearchResult) == result


def test_policies_that_the_samples_do_not_tell_apart_contend() -> None:
    rng = np.random.default_rng(0)
    easy = rng.lognormal(size=200)
    errors = {0: easy, 1: easy * 1.01 + rng.normal(0, 0.5, 200), 2: easy + 1.0, 3: easy}
    ranked = {i: float(e.mean()) for i, e in errors.items()}
    formats = ((("w3a3",),), (("w4a4",),), (("w8a8",),), (("w3a3",),))
    points = [point("beam", 4, ranked[i], formats=formats[i]) for i in range(4)]
    # The third is worse at every sample; the last is the first policy again.
    near = [0, 1] if ranked[0] <= ranked[1] else [1, 0]
    assert contenders(points, [0, 1, 2, 3], errors) == near
    few = {i: e[:4] for i, e in errors.items()}
    assert set(contenders(points, [0, 1, 2, 3], few)) == {0, 1, 2}

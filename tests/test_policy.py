"""Policies: averages, buckets, and what becomes of damaged or foreign files."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError
from adatsq_trt.formats import FORMATS
from adatsq_trt.policy import Bucket, LayerShape, Policy, mean_bits, resident_weight_bytes

LAYERS = ("a", "b", "c")
SHAPES = [LayerShape("a", 64, 64, 10), LayerShape("b", 128, 64, 10), LayerShape("c", 64, 256, 2)]


def make(*rows: str) -> Policy:
    """A policy from rows such as "fp8 fp8 bf16"."""
    return Policy.from_steps("tiny", "0" * 64, LAYERS, [row.split() for row in rows])


def tables() -> st.SearchStrategy[list[list[str]]]:
    """A format for each of 3 layers at 1 to 8 steps, few enough formats that rows repeat."""
    row = st.lists(st.sampled_from(["nvfp4", "fp8", "w3a3"]), min_size=3, max_size=3)
    return st.lists(row, min_size=1, max_size=8)


@given(rows=tables())
def test_a_policy_says_at_every_step_what_it_was_made_of(rows: list[list[str]]) -> None:
    policy = Policy.from_steps("tiny", "0" * 64, LAYERS, rows)
    for step, row in enumerate(rows):
        assert policy.formats_at(step) == {layer: FORMATS[name] for layer, name in zip(LAYERS, row, strict=True)}
    assert len(policy.assignments) == len({tuple(row) for row in rows})
    assert policy.mean_bits == pytest.approx(mean_bits([[FORMATS[name] for name in row] for row in rows]))


@given(rows=tables())
def test_buckets_cover_the_loop_once_and_differ_from_their_neighbours(rows: list[list[str]]) -> None:
    policy = Policy.from_steps("tiny", "0" * 64, LAYERS, rows)
    steps = [step for bucket in policy.buckets for step in range(bucket.first, bucket.last + 1)]
    assert steps == list(range(len(rows)))
    for bucket in policy.buckets:
        assert set(policy.step_assignments[bucket.first : bucket.last + 1]) == {bucket.assignment}
    indices = [bucket.assignment for bucket in policy.buckets]
    assert all(a != b for a, b in pairwise(indices))


@given(rows=tables())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip_gives_the_same_bytes(tmp_path: Path, rows: list[list[str]]) -> None:
    policy = Policy.from_steps("tiny", "0" * 64, LAYERS, rows)
    policy.save(tmp_path / "policy.json")
    loaded = Policy.load(tmp_path / "policy.json")
    assert loaded == policy
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "policy.json").read_bytes()


def test_a_returning_assignment_is_one_assignment_in_two_buckets() -> None:
    policy = make("fp8 fp8 fp8", "fp8 fp8 bf16", "fp8 fp8 bf16", "fp8 fp8 fp8")
    assert policy.buckets == (Bucket(0, 0, 0), Bucket(1, 2, 1), Bucket(3, 3, 0))
    assert len(policy.assignments) == 2


def test_averages_by_hand() -> None:
    policy = make("nvfp4 fp8 bf16", "nvfp4 nvfp4 w8a8")
    assert policy.mean_bits == pytest.approx((4 + 8 + 16 + 4 + 4 + 8) / 6)
    parameters = {"a": 64 * 64, "b": 128 * 64, "c": 64 * 256}
    stored = {"a": (4.5, 4.5), "b": (8 + 16 / 128, 4.5), "c": (16, 8 + 16 / 64)}
    total = sum(parameters[n] * sum(stored[n]) for n in LAYERS)
    assert policy.mean_weight_bits(SHAPES) == pytest.approx(total / (2 * sum(parameters.values())))
    operations = {"a": parameters["a"] * 10, "b": parameters["b"] * 10, "c": parameters["c"] * 2}
    moved = {"a": (4.5, 4.5), "b": (8, 4.5), "c": (16, 8 + 32 / 64)}
    total = sum(operations[n] * sum(moved[n]) for n in LAYERS)
    assert policy.mean_activation_bits(SHAPES) == pytest.approx(total / (2 * sum(operations.values())))


def test_each_distinct_weight_grid_of_a_layer_is_resident_once() -> None:
    shapes = {shape.name: shape for shape in SHAPES}
    # w8a8 and w8a8s differ in activations only, so layer "a" holds one copy; layer "c" holds two.
    policy = make("w8a8 fp8 bf16", "w8a8s fp8 nvfp4", "w8a8 fp8 bf16")
    a, b = 64 * 64 * (8 + 16 / 64) / 8, 128 * 64 * (8 + 16 / 128) / 8
    assert resident_weight_bytes(policy, shapes) == round(a + b + 64 * 256 * (16 + 4.5) / 8)


def save_changed(path: Path, **changes: object) -> None:
    """Save a valid policy with some fields replaced."""
    content = json.loads(make("fp8 fp8 fp8", "bf16 bf16 bf16").model_dump_json())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this version of adatsq-trt reads 1"),
        ({"steps": 3}, "2 entries, steps is 3"),
        ({"assignments": [["fp8", "fp8"], ["bf16", "bf16"]]}, "2 entries for 3 layers"),
        ({"assignments": [["fp8"] * 3, ["fp7"] * 3]}, "unknown format 'fp7'"),
        ({"step_assignments": [0, 0]}, "use every assignment"),
        ({"step_assignments": [0, 5]}, "use every assignment"),
        ({"colour": "red"}, "colour"),
        ({"layers": None}, "layers"),
        ({"layers": ["a", "b", "a"]}, "layers names one twice"),
        ({"layers": [], "assignments": [[], []]}, "layers"),
        ({"steps": 0, "assignments": [], "step_assignments": []}, "steps: got 0"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_changed(tmp_path / "policy.json", **changes)
    with pytest.raises(DamagedFileError, match=message):
        Policy.load(tmp_path / "policy.json")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    make("fp8 fp8 fp8", "bf16 bf16 bf16").save(path)
    content = path.read_bytes().rstrip()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"policy\.json"):
            Policy.load(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"policy\.json"):
        Policy.load(tmp_path / "policy.json")


def test_a_policy_for_something_else_is_refused() -> None:
    policy = make("fp8 fp8 fp8", "bf16 bf16 bf16")
    policy.require("0" * 64, 2, LAYERS)
    with pytest.raises(MismatchError, match="weights 000000000000, this model has weights 111111111111"):
        policy.require("1" * 64, 2, LAYERS)
    with pytest.raises(MismatchError, match="has 2 steps, the run has 3; pass --steps 2"):
        policy.require("0" * 64, 3, LAYERS)


@pytest.mark.parametrize(
    ("of_model", "message"),
    [
        (lambda names: names[:2], "the policy has a layer '{last}', which model 'tiny' has not or does not quantize "),
        (lambda names: (*names[:2], names[2] + "x"), "'{last}', which model .*; did you mean '{last}x'"),
        (lambda names: (*names, "more", "still"), "says nothing of 2 layers of model 'tiny', the first is 'more';"),
        (lambda names: names[::-1], "layers of model 'tiny' in another order: got '{first}' at place 0, expected"),
    ],
)
def test_a_policy_with_other_layers_of_the_same_weights_names_them(
    of_model: Callable[[tuple[str, ...]], tuple[str, ...]], message: str
) -> None:
    policy = make("fp8 fp8 fp8", "bf16 bf16 bf16")
    with pytest.raises(MismatchError, match=message.format(first=LAYERS[0], last=LAYERS[-1])):
        policy.require("0" * 64, 2, of_model(tuple(LAYERS)))


def test_policies_do_not_change() -> None:
    with pytest.raises(ValidationError):
        make("fp8 fp8 fp8").steps = 2

"""Plans by the real compiler, and what a second build keeps."""

import lzma
from pathlib import Path

import pytest

from adatsq_trt.engines.backends.base import BatchRange, Compiler
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.build import RECORD_NAME, build_plans
from adatsq_trt.engines.bundle import BundleFiles, Layout, PlanFile
from adatsq_trt.engines.plan_weights import STORE_NAME, read_plan
from adatsq_trt.errors import AdatsqError, DamagedFileError
from adatsq_trt.formats import TARGETS, Target


class RecordingCompiler(Compiler):
    """Stands in for the compiler where only the bookkeeping matters; a plan is a list of what it was made from."""

    name = "recording"

    def __init__(self) -> None:
        self.built: list[str] = []

    def require(self) -> None:
        pass

    def version(self) -> str:
        return "1"

    def build(self, onnx_path: Path, target: Target, batch: BatchRange) -> bytes:
        self.built.append(f"{target.name}/{onnx_path.name}")
        return repr((target.name, onnx_path.name, batch)).encode()


def build(
    bundle: BundleFiles, compiler: Compiler, *targets: str, rows: int = 8, layout: Layout = "embedded"
) -> list[str]:
    chosen = [TARGETS[t] for t in targets]
    plans = build_plans(bundle.folder, bundle.index, chosen, rows, compiler=compiler, layout=layout)
    return [plan.path for plan in plans]


def test_the_compiler_makes_a_plan_for_each_target_and_assignment(own_bundle: BundleFiles) -> None:
    told: list[tuple[int, int]] = []
    targets = [TARGETS["sm89"], TARGETS["sm120"]]
    plans = build_plans(own_bundle.folder, own_bundle.index, targets, 8, lambda *done: told.append(done))
    assert [(plan.target, plan.assignment) for plan in plans] == [(t.name, i) for t in targets for i in range(3)]
    assert [plan.path for plan in plans][-1] == "plans/sm120/assignment_002.plan"
    for plan in plans:
        assert (own_bundle.folder / plan.path).stat().st_size == plan.bytes > 1000
    assert told == [(i, 6) for i in range(1, 7)]


def test_several_compilers_make_the_same_plans(own_bundle: BundleFiles, tmp_path: Path) -> None:
    targets, made = [TARGETS["sm120"]], []
    for jobs in (1, 2):
        plans = build_plans(own_bundle.folder, own_bundle.index, targets, 8, jobs=jobs)
        made.append([(own_bundle.folder / plan.path).read_bytes() for plan in plans])
        for plan in plans:
            (own_bundle.folder / plan.path).unlink()
    assert made[0] == made[1]
    assert len(made[0]) == 3


def test_a_refusal_of_one_of_several_compilers_is_told(own_bundle: BundleFiles) -> None:
    own_bundle.graph_path(own_bundle.graph("target", 1)).write_bytes(b"no graph")
    with pytest.raises(AdatsqError, match=r"assignment_001"):
        build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 8, jobs=2)


def test_switch_is_one_plan_for_each_target(own_bundle: BundleFiles) -> None:
    targets = [TARGETS["sm89"], TARGETS["sm120"]]
    plans = build_plans(own_bundle.folder, own_bundle.index, targets, 8, layout="switch")
    assert [(plan.path, plan.assignment) for plan in plans] == [
        ("plans/sm89/switch.plan", None),
        ("plans/sm120/switch.plan", None),
    ]
    assert all((own_bundle.folder / plan.path).stat().st_size == plan.bytes > 1000 for plan in plans)


def test_shared_plans_come_with_the_store_that_they_are_bound_to(own_bundle: BundleFiles) -> None:
    plans = build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 8, layout="shared")
    assert [plan.assignment for plan in plans] == [0, 1, 2]
    assert (own_bundle.folder / "plans" / STORE_NAME).is_file()
    assert plans[0].path == "plans/sm120/assignment_000.plan.xz"
    for plan in plans:
        assert (own_bundle.folder / plan.path).stat().st_size == plan.bytes
        unpacked = read_plan(own_bundle.folder, plan)
        assert len(unpacked) == plan.unpacked_bytes
        assert plan.bytes < len(unpacked) / 4
        assert unpacked[:4] == b"vtrt"
    again = build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 8, layout="shared")
    assert again == plans


@pytest.mark.parametrize("content", [b"", b"no archive", lzma.compress(b"12345"), lzma.compress(b"1234567")])
def test_a_plan_that_does_not_unpack_to_its_size_is_refused(tmp_path: Path, content: bytes) -> None:
    plan = PlanFile(target="sm120", assignment=0, path="a.plan.xz", bytes=1, unpacked_bytes=6, max_rows=1)
    (tmp_path / plan.path).write_bytes(lzma.compress(b"123456"))
    assert read_plan(tmp_path, plan) == b"123456"
    (tmp_path / plan.path).write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.plan\.xz.*run 'adatsq-trt build engine' again"):
        read_plan(tmp_path, plan)


def test_another_layout_leaves_nothing_of_the_one_before(own_bundle: BundleFiles) -> None:
    for layout, count in (("shared", 3), ("switch", 1), ("embedded", 3), ("switch", 1)):
        compiler = RecordingCompiler()
        paths = build(own_bundle, compiler, "sm120", layout=layout)
        found = [path.relative_to(own_bundle.folder).as_posix() for path in own_bundle.folder.rglob("*.plan*")]
        assert sorted(found) == sorted(paths)
        assert (own_bundle.folder / "plans" / STORE_NAME).is_file() == (layout == "shared")
        assert len(compiler.built) == count


@pytest.mark.parametrize("layout", ["embedded", "shared", "switch"])
def test_plans_say_their_optimization_profiles(own_bundle: BundleFiles, layout: Layout) -> None:
    batch, compiler = BatchRange(1, 64, 64, smaller=(2, 16)), RecordingCompiler()
    plans = build_plans(
        own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], batch, compiler=compiler, layout=layout
    )
    for plan in plans:
        assert (plan.max_rows, plan.profile_rows) == (64, (2, 16, 64))
        assert [plan.profile(rows) for rows in (1, 2, 3, 16, 17, 64)] == [0, 0, 1, 1, 2, 2]
    (single, *_) = build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 8, compiler=compiler)
    assert (single.profile_rows, single.profile(1), single.profile(8)) == ((), 0, 0)


def test_the_same_graph_gives_the_same_plan(tiny_bundle: BundleFiles) -> None:
    path = tiny_bundle.graph_path(tiny_bundle.graph("target", 0))
    first, second = (RtxBackend().build(path, TARGETS["sm120"], BatchRange(1, 8, 8)) for _ in range(2))
    assert first == second


def test_a_second_build_keeps_everything(own_bundle: BundleFiles) -> None:
    first, second = RecordingCompiler(), RecordingCompiler()
    paths = build(own_bundle, first, "sm89", "sm120")
    assert len(first.built) == 6
    assert build(own_bundle, second, "sm89", "sm120") == paths
    assert second.built == []


def test_only_what_changed_is_built_again(own_bundle: BundleFiles) -> None:
    build(own_bundle, RecordingCompiler(), "sm120")
    graph = own_bundle.graph_path(own_bundle.graph("target", 1))
    graph.write_bytes(graph.read_bytes() + b"\x00")
    (own_bundle.folder / "plans/sm120/assignment_002.plan").write_bytes(b"cut off")
    again = RecordingCompiler()
    build(own_bundle, again, "sm120")
    assert again.built == ["sm120/assignment_001.target.onnx", "sm120/assignment_002.target.onnx"]


def test_other_shapes_or_weights_build_everything_again(own_bundle: BundleFiles) -> None:
    build(own_bundle, RecordingCompiler(), "sm120")
    larger, other = RecordingCompiler(), RecordingCompiler()
    build(own_bundle, larger, "sm120", rows=16)
    weights = own_bundle.folder / "onnx" / "weights.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    build(own_bundle, other, "sm120", rows=16)
    assert len(larger.built) == len(other.built) == 3


def test_a_damaged_record_costs_only_time(own_bundle: BundleFiles) -> None:
    build(own_bundle, RecordingCompiler(), "sm120")
    (own_bundle.folder / "plans/sm120" / RECORD_NAME).write_text("{")
    again = RecordingCompiler()
    build(own_bundle, again, "sm120")
    assert len(again.built) == 3


def test_the_cpu_needs_no_plans(own_bundle: BundleFiles) -> None:
    assert build(own_bundle, RecordingCompiler(), "cpu") == []
    assert not (own_bundle.folder / "plans").exists()


def test_a_refused_graph_leaves_no_plan(own_bundle: BundleFiles) -> None:
    own_bundle.graph_path(own_bundle.graph("target", 1)).write_bytes(b"no graph")
    with pytest.raises(AdatsqError, match=r"cannot read .*assignment_001\.target\.onnx"):
        build(own_bundle, RtxBackend(), "sm120")
    assert [p.name for p in (own_bundle.folder / "plans/sm120").glob("*.plan")] == ["assignment_000.plan"]

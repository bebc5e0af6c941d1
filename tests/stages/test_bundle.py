"""Stage `bundle`: the exported files with their manifest, and the options of its compilers."""

from pathlib import Path

import pytest

from adatsq_trt import __version__
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend
from adatsq_trt.engines.bundle import BundleFiles, ScheduleRecord
from adatsq_trt.errors import MissingFileError
from adatsq_trt.files import read_json_model, sha256
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.stages import bundle, export, search
from adatsq_trt.stages.context import Context


def with_settings(context: Context, **changes: object) -> Context:
    return Context(context.run, context.settings.model_copy(update=changes), context.model)


def test_the_manifest_says_what_was_built(finished: Context) -> None:
    files = BundleFiles.open(bundle.stage(finished).folder)
    manifest, adapter = files.manifest, finished.adapter
    assert (manifest.model, manifest.backend, manifest.plans) == ("tiny", "onnxruntime", ())
    assert (manifest.targets, manifest.base_type) == (("cpu",), "float32")
    assert manifest.latent_shape == adapter.latent_shape
    assert manifest.pixels == finished.model.scale.size(adapter.image)
    assert manifest.prompts == len(adapter.prompts)
    assert manifest.guidance == finished.settings.guidance
    assert manifest.schedule == ScheduleRecord.of(finished.schedule)
    policy = Policy.load(search.stage(finished).folder / search.POLICY)
    assert files.policy == policy
    assert manifest.formats == export.used_formats(policy)


def test_its_files_are_the_exported_bytes(finished: Context) -> None:
    exported, own = export.stage(finished).folder, bundle.stage(finished).folder
    names = [file.relative_to(exported) for file in exported.rglob("*") if file.is_file()]
    assert names
    for name in names:
        assert sha256(own / name) == sha256(exported / name)
        assert not (own / name).samefile(exported / name), "onnx refuses external data with two names"


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"'.*gone' is gone; run the same command again"):
        bundle._copy(tmp_path / "gone", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_versions_are_of_what_is_installed() -> None:
    versions = bundle.library_versions()
    assert versions["adatsq-trt"] == __version__
    assert {"torch", "onnx", "diffusers"} <= set(versions)
    assert not bundle._installed("a-package-that-nobody-has")


def test_profiles_have_a_row_for_each_branch_of_guidance(finished: Context) -> None:
    index = read_json_model(export.stage(finished).folder / export.GRAPHS / INDEX_NAME, GraphIndex)
    rows = bundle._profiles(with_settings(finished, batch=(1, 4, 8)), index.find("cpu", None))
    assert [profile.optimum for profile in rows.profiles] == [2, 8, 16]
    assert {profile.minimum for profile in rows.profiles} == {1}


def test_the_backend_has_its_options(finished: Context) -> None:
    assert isinstance(bundle._compiler(finished), RtxBackend)
    changes = {"backend": "tensorrt", "hardware_compatibility": "ampere_plus", "weight_streaming": True}
    context = with_settings(finished, **changes)
    assert isinstance(bundle._compiler(context), TensorRTBackend)
    assert bundle._compatibility(context.settings).hardware == "ampere_plus"


@pytest.mark.parametrize(
    ("changes", "done"),
    [({"batch": (32,)}, True), ({"batch": (4,)}, False), ({"weight_streaming": True}, True), ({"steps": 3}, False)],
)
def test_options_count_where_they_are_used(finished: Context, changes: dict[str, object], done: bool) -> None:
    assert bundle.stage(with_settings(finished, **changes)).done is done

"""Models for the server's TensorRT backend, as files: no server with TensorRT is at hand."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from adatsq_trt.engines.bundle import BundleFiles, PlanFile, write_manifest
from adatsq_trt.engines.triton_server.plan_models import write_plan_repository
from adatsq_trt.errors import UserError
from tests.engines.conftest import ASSIGNMENTS

TARGETS, VERSION = ("sm89", "sm120"), "10.13.2.6"


@pytest.fixture
def bundle(own_bundle: BundleFiles) -> BundleFiles:
    """With plans as enterprise TensorRT would have made them."""
    plans = [
        PlanFile(target=target, assignment=i, path=f"plans/{target}/assignment_{i:03d}.plan", bytes=9, max_rows=64)
        for target in TARGETS
        for i in range(len(ASSIGNMENTS))
    ]
    for plan in plans:
        path = own_bundle.folder / plan.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{plan.target} {plan.assignment}")
    changes = {"backend": "tensorrt", "layout": "embedded", "plans": tuple(plans), "versions": {"tensorrt": VERSION}}
    write_manifest(own_bundle.folder, own_bundle.manifest.model_copy(update=changes))
    return BundleFiles.open(own_bundle.folder)


def changed(bundle: BundleFiles, **changes: object) -> BundleFiles:
    return BundleFiles(bundle.folder, bundle.manifest.model_copy(update=changes), bundle.policy, bundle.index)


def test_a_model_for_each_assignment_with_a_plan_for_each_target(bundle: BundleFiles, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    write_plan_repository([("tiny", bundle)], output)
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "tiny_000", "tiny_001", "tiny_002"]
    for i in range(len(ASSIGNMENTS)):
        folder = output / f"tiny_{i:03d}"
        config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        assert (config.name, config.platform, config.max_batch_size) == (folder.name, "tensorrt_plan", 0)
        assert config.default_model_filename == "sm89.plan"
        assert dict(config.cc_model_filenames) == {"8.9": "sm89.plan", "12.0": "sm120.plan"}
        for target in TARGETS:
            assert (folder / "1" / f"{target}.plan").read_text() == f"{target} {i}"


def test_inputs_are_those_of_the_target_graph(bundle: BundleFiles, tmp_path: Path) -> None:
    write_plan_repository([("tiny", bundle)], tmp_path / "repository")
    config = text_format.Parse((tmp_path / "repository" / "tiny_002" / "config.pbtxt").read_text(), ModelConfig())
    inputs = {tensor.name: tensor for tensor in config.input}
    assert {name: list(tensor.dims) for name, tensor in inputs.items()} == {
        "hidden_states": [-1, 4, 16],
        "pooled": [-1, 16],
        "timestep": [-1],
        "blocks.1.linear.scale": [1],  # the first layer is in bf16
    }
    assert [name for name, tensor in inputs.items() if tensor.HasField("reshape")] == ["blocks.1.linear.scale"]
    assert not inputs["blocks.1.linear.scale"].reshape.shape
    kinds = {text_format.MessageToString(tensor).split("data_type: ")[1].split()[0] for tensor in inputs.values()}
    assert kinds == {"TYPE_BF16"}
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [("velocity", [-1, 4, 16])]


def test_the_readme_says_what_was_not_tested_and_which_version_it_takes(bundle: BundleFiles, tmp_path: Path) -> None:
    write_plan_repository([("tiny", bundle)], tmp_path / "repository")
    readme = (tmp_path / "repository" / "README.md").read_text()
    assert "**Not tested:**" in readme
    assert f"with TensorRT {VERSION}" in readme
    assert readme.replace("$PWD", "").count("$") == 0


REFUSALS = {
    "rtx": ({"backend": "rtx"}, "has plans of rtx, the server's TensorRT backend runs those of tensorrt only"),
    "none": ({"plans": ()}, "has no plans"),
    "shared": ({"layout": "shared"}, "has layout shared, .* build it again with --layout embedded"),
    "switch": ({"layout": "switch"}, "has layout switch"),
    "version": ({"versions": {}}, "does not say which version of tensorrt"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bundles_that_the_backend_cannot_serve(bundle: BundleFiles, tmp_path: Path, name: str) -> None:
    changes, message = REFUSALS[name]
    with pytest.raises(UserError, match=message):
        write_plan_repository([("tiny", changed(bundle, **changes))], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_one_server_has_one_version(bundle: BundleFiles, tmp_path: Path) -> None:
    other = changed(bundle, versions={"tensorrt": "11.0.0.1"})
    with pytest.raises(UserError, match=r"TensorRT 10.13.2.6 and 11.0.0.1, a server has one"):
        write_plan_repository([("a", bundle), ("b", other)], tmp_path / "repository")
    with pytest.raises(UserError, match="--name 'a/b': expected letters"):
        write_plan_repository([("a/b", bundle)], tmp_path / "repository")

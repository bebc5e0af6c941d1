"""The model repository as files; the real server loads it in tests/serving."""

import hashlib
from pathlib import Path

import pytest
import yaml

from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles, ImageSpec, PlanFile
from adatsq_trt.engines.triton_server.repository import Deployment, curl_line, write_repository
from adatsq_trt.errors import OutputError, UserError


def with_plans(files: BundleFiles, max_rows: int, version: str) -> BundleFiles:
    plan = PlanFile(target="sm120", assignment=0, path="plans/sm120/a.plan", bytes=1, max_rows=max_rows)
    manifest = files.manifest.model_copy(update={"plans": (plan,), "versions": {"tensorrt-rtx": version}})
    return BundleFiles(files.folder, manifest, files.policy, files.index)


def test_files(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    output = tmp_path / "new" / "repository"
    write_repository([Deployment("tiny", tiny_bundle, step_model=True), Deployment("other", tiny_bundle)], output)
    written = ["Dockerfile", "README.md", "compose.yaml", "other", "probe.py", "tiny", "tiny_step"]
    assert sorted(path.name for path in output.iterdir()) == written
    copied = BundleFiles.open(output / "tiny" / "1")
    assert copied.manifest == tiny_bundle.manifest
    config = (output / "tiny" / "config.pbtxt").read_text()
    assert hashlib.sha256((copied.folder / MANIFEST_NAME).read_bytes()).hexdigest() in config
    assert "dims: [ -1, 4, 16 ]" in config
    step = (output / "tiny_step" / "config.pbtxt").read_text()
    assert '{ name: "pooled" data_type: TYPE_FP32 dims: [ 16 ] }' in step
    assert '"timestep"' not in step
    assert '"../tiny/1/bundle"' in step
    assert not (output / "tiny_step" / "1" / "bundle").exists()
    readme = (output / "README.md").read_text()
    assert curl_line("tiny") in readme
    assert "docker run --rm --publish" in readme
    # Nothing is left to fill in, but for the shell.
    assert "$" not in "".join(path.read_text() for path in output.rglob("*.pbtxt"))
    assert readme.replace("$PWD", "").count("$") == 0


def test_links_instead_of_copies(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    write_repository([Deployment("tiny", tiny_bundle)], tmp_path / "repository", link=True)
    assert (tmp_path / "repository" / "tiny" / "1" / "bundle").resolve() == tiny_bundle.folder.resolve()


def test_plans_on_a_gpu(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    built = with_plans(tiny_bundle, 64, "1.7.1")
    write_repository([Deployment("tiny", built, backend="rtx")], tmp_path / "r")
    assert "kind: KIND_GPU" in (tmp_path / "r" / "tiny" / "config.pbtxt").read_text()
    assert "tensorrt-rtx==1.7.1 torch" in (tmp_path / "r" / "Dockerfile").read_text()
    assert "docker run --rm --gpus all --publish" in (tmp_path / "r" / "README.md").read_text()
    service = yaml.safe_load((tmp_path / "r" / "compose.yaml").read_text())["services"]["tritonserver"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_videos_that_a_vae_decodes(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    image = ImageSpec(patches=2, channels=1, frames=4, vae=True)
    manifest = tiny_bundle.manifest.model_copy(update={"image": image})
    files = BundleFiles(tiny_bundle.folder, manifest, tiny_bundle.policy, tiny_bundle.index)
    write_repository([Deployment("tiny", files)], tmp_path / "r")
    config = (tmp_path / "r" / "tiny" / "config.pbtxt").read_text()
    assert "dims: [ -1, -1, -1, -1, -1 ] },          # [samples, frames, height, width, channels], 0 to 1" in config
    assert "pydantic safetensors torch accelerate diffusers \\" in (tmp_path / "r" / "Dockerfile").read_text()


def refused(deployments: list[Deployment], output: Path, message: str) -> None:
    before = list(output.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        write_repository(deployments, output)
    assert list(output.parent.rglob("*")) == before


def test_refusals_write_nothing(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    one, output = Deployment("tiny", tiny_bundle), tmp_path / "repository"
    refused([one, one], output, "two models would be served as 'tiny'")
    step = Deployment("tiny", tiny_bundle, step_model=True)
    refused([step, Deployment("tiny_step", tiny_bundle)], output, "two models would be served as 'tiny_step'")
    refused([Deployment("a/b", tiny_bundle)], output, "--name 'a/b': expected letters")
    refused([Deployment("tiny", tiny_bundle, backend="rtx")], output, "has no plans for --backend rtx")
    unknown = with_plans(tiny_bundle, 64, "1.7.1")
    unknown.manifest.versions.clear()
    refused([Deployment("tiny", unknown, backend="rtx")], output, "does not say which version of tensorrt-rtx")
    small = with_plans(tiny_bundle, 16, "1.7.1")
    refused([Deployment("tiny", small, backend="rtx")], output, "the plans take 16; pass --max-samples 8")
    versions = [
        Deployment(f"v{i}", with_plans(tiny_bundle, 64, version), backend="rtx")
        for i, version in enumerate(("1.7.1", "1.8"))
    ]
    refused(versions, output, "TensorRT-RTX 1.7.1 and 1.8, one image holds one")
    output.mkdir()
    (output / "mine").touch()
    refused([one], output, "exists; pass another --output")


def test_a_failure_leaves_nothing(tiny_bundle: BundleFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_repository([Deployment("tiny", tiny_bundle)], tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []

"""Bundles that are not what they say: refused before any library sees a graph or a plan."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from adatsq_trt.engines.backends import device_steps, plan_steps
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.bundle import BundleFiles, PlanFile, write_manifest
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError
from tests.doubles.host_device import HostDevice

PLAN = "plans/sm120/assignment_000.plan"


@pytest.fixture
def with_plan(own_bundle: BundleFiles, monkeypatch: pytest.MonkeyPatch) -> BundleFiles:
    """A bundle with a plan for sm120, on a machine that has such a GPU as far as anyone asks."""
    import tensorrt_rtx

    file = own_bundle.folder / PLAN
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(range(256)))
    plan = PlanFile(target="sm120", assignment=0, path=PLAN, bytes=256, max_rows=8)
    versions = {"tensorrt-rtx": tensorrt_rtx.__version__}
    write_manifest(own_bundle.folder, own_bundle.manifest.model_copy(update={"plans": (plan,), "versions": versions}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(device_steps, "CudaDevice", HostDevice)
    return BundleFiles.open(own_bundle.folder)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was given to a library to load."""
    given: list[str] = []

    def record(*arguments: object, **_: object) -> None:
        given.append(repr(arguments))
        raise AssertionError("something was loaded")

    monkeypatch.setattr(OnnxRuntimeBackend, "load", record)
    monkeypatch.setattr(plan_steps, "read_plan", record)
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "Runtime", record)
    return given


def changed_byte(files: BundleFiles) -> None:
    content = bytearray((files.folder / PLAN).read_bytes())
    content[100] ^= 1
    (files.folder / PLAN).write_bytes(content)


def missing(files: BundleFiles) -> None:
    (files.folder / PLAN).unlink()


def without_hash(files: BundleFiles) -> None:
    hashes = {name: value for name, value in files.manifest.files.items() if name != PLAN}
    rewrite(files, files=hashes)


def rewrite(bundle: BundleFiles, **fields: object) -> None:
    manifest = bundle.manifest.model_copy(update=fields)
    (bundle.folder / "manifest.json").write_text(manifest.model_dump_json())


def with_path(path: str) -> Callable[[BundleFiles], None]:
    def damage(files: BundleFiles) -> None:
        (plan,) = files.manifest.plans
        hashes = {**files.manifest.files, path: files.manifest.files[PLAN]}
        rewrite(files, plans=(plan.model_copy(update={"path": path}),), files=hashes)

    return damage


def link_outside(files: BundleFiles) -> None:
    outside = files.folder.parent / "outside.plan"
    (files.folder / PLAN).rename(outside)
    (files.folder / PLAN).symlink_to(outside)


def other_version(files: BundleFiles) -> None:
    rewrite(files, versions={"tensorrt-rtx": "1.0.0"})


def other_gpu(files: BundleFiles) -> None:
    (plan,) = files.manifest.plans
    rewrite(files, plans=(plan.model_copy(update={"target": "sm89"}),))


def truncated_manifest(files: BundleFiles) -> None:
    file = files.folder / "manifest.json"
    file.write_text(file.read_text()[:300])


DAMAGES: dict[str, tuple[Callable[[BundleFiles], None], str]] = {
    "a changed byte": (changed_byte, r"was altered: got sha256 .*run 'adatsq-trt build engine' again"),
    "a missing plan": (missing, r"assignment_000\.plan' is gone; run 'adatsq-trt build engine' again"),
    "a plan without a hash": (without_hash, "has no hash for .* so it is not read"),
    "..": (with_path("../outside.plan"), "expected a path inside the bundle; get the bundle from a source that you"),
    "an absolute path": (with_path("/etc/hostname"), "expected a path inside the bundle"),
    "a link": (link_outside, "expected a path inside the bundle"),
    "another version": (
        other_version,
        r"of TensorRT-RTX 1\.0\.0, .* is installed; build the bundle again, or run: pip",
    ),
    "another GPU": (other_gpu, "GPU is sm120, the bundle has plans for sm89; build it again with --target sm120"),
    "half a manifest": (truncated_manifest, r"manifest\.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_bundle_is_refused_before_anything_is_loaded(
    with_plan: BundleFiles, loaded: list[str], name: str
) -> None:
    damage, message = DAMAGES[name]
    Bundle.open(with_plan.folder, "rtx")  # it is sound, and opening it loads nothing
    damage(with_plan)
    with pytest.raises((DamagedFileError, MissingFileError, UserError), match=message):
        Bundle.open(with_plan.folder, "rtx")
    assert loaded == []


REQUESTS: dict[str, tuple[dict[str, object], str]] = {
    "other steps": ({"steps": 20}, "steps: got 20, the bundle's policy is for 4; .*--steps 20"),
    "more rows than the profile": ({"samples": 5}, "got 10 rows .*the plans accept at most 8; denoise fewer samples"),
    "latents of another shape": ({"latents": np.zeros((1, 4, 15), np.float32)}, r"got float32 \[1, 4, 15\], expected"),
    "conditioning of another shape": (
        {"conditioning": Conditioning({"pooled": np.zeros((1, 15), np.float32)})},
        r"input 'pooled': got float32 \[1, 15\], expected",
    ),
    "conditioning of another name": (
        {"conditioning": Conditioning({"text": np.zeros((1, 16), np.float32)})},
        "got the inputs .*'text'.*expected .*'pooled'",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused_before_anything_is_loaded(
    with_plan: BundleFiles, loaded: list[str], name: str
) -> None:
    change, message = REQUESTS[name]
    bundle = Bundle.open(with_plan.folder, "rtx")
    samples = int(str(change.get("samples", 1)))
    request = {"latents": bundle.noise(range(samples)), "conditioning": bundle.conditioning([0] * samples), **change}
    request.pop("samples", None)
    with pytest.raises(UserError, match=message):
        bundle.denoise(**request)
    assert loaded == []


def test_sound_plans_do_reach_the_library(with_plan: BundleFiles, loaded: list[str]) -> None:
    """Otherwise the tests above could not fail."""
    bundle = Bundle.open(with_plan.folder, "rtx")
    with pytest.raises(AssertionError, match="something was loaded"):
        bundle.denoise(bundle.noise([0]), bundle.conditioning([0]))
    assert len(loaded) == 1

"""What is decided about plans before any is deserialized, and the store as the runtime reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from adatsq_trt.engines.backends.plan_controls import load_store
from adatsq_trt.engines.backends.rtx_steps import cache_file, plans_here, runnable_plans
from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile, write_manifest
from adatsq_trt.engines.plan_weights import Weight, write_store
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError, UserError


@pytest.fixture
def manifest(tiny_bundle: BundleFiles) -> Manifest:
    plans = tuple(
        PlanFile(target=target, assignment=i, path=f"{target}/{i}", bytes=1, max_rows=8)
        for target in ("sm89", "sm120")
        for i in range(2)
    )
    return tiny_bundle.manifest.model_copy(update={"plans": plans, "versions": {"tensorrt-rtx": "1.7.1"}})


def test_the_gpus_own_plans(manifest: Manifest) -> None:
    assert [plan.path for plan in runnable_plans(manifest, "1.7.1", 120)] == ["sm120/0", "sm120/1"]


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("1.7.1", 86, r"GPU is sm86, the bundle has plans for sm89, sm120; .*--target sm86"),
        ("1.7.1", 90, r"GPU is sm90"),
        ("1.8.0", 120, r"of TensorRT-RTX 1\.7\.1, 1\.8\.0 is installed.*pip install tensorrt-rtx==1\.7\.1"),
    ],
)
def test_plans_for_something_else(manifest: Manifest, version: str, capability: int, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        runnable_plans(manifest, version, capability)


def test_plans_of_another_library(manifest: Manifest) -> None:
    """Such a bundle, too, names the version of TensorRT-RTX that was there when it was built."""
    with pytest.raises(MismatchError, match="plans are of tensorrt, not of TensorRT-RTX; run it with backend 'tensorr"):
        runnable_plans(manifest.model_copy(update={"backend": "tensorrt"}), "1.7.1", 120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_plans_need_a_gpu(tiny_bundle: BundleFiles, manifest: Manifest) -> None:
    with pytest.raises(DependencyError, match="run on a GPU only"):
        plans_here(manifest)
    with pytest.raises(DependencyError, match="run on a GPU only"):
        Bundle.open(tiny_bundle.folder, "rtx")


def test_more_rows_than_the_optimization_profile(
    tiny_bundle: BundleFiles, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adatsq_trt.engines.backends.rtx_steps.plans_here", lambda _: manifest.plans)
    bundle = Bundle.open(tiny_bundle.folder, "rtx")
    with pytest.raises(UserError, match=r"got 10 rows .*at most 8"):
        bundle.denoise(bundle.noise(range(5)), bundle.conditioning([0] * 5))


class Host:
    """Memory of the processor."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


def test_store_in_one_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 1000, np.uint8).tobytes()
    weights = {Weight(0, 300, TensorProto.INT8, (300,)): "a", Weight(500, 500, TensorProto.INT8, (5, 100)): "b"}
    (tmp_path / "data").write_bytes(content)
    write_store(tmp_path / "store", tmp_path / "data", weights)
    loaded = load_store(tmp_path / "store", Host())
    assert loaded["a"].numpy().tobytes() == content[:300]
    assert loaded["b"].numpy().tobytes() == content[500:]
    assert loaded["b"].data_ptr() - loaded["a"].data_ptr() == 512
    some = load_store(tmp_path / "store", Host(), {"b", "an input that is no weight"})
    assert list(some) == ["b"]
    assert some["b"].numpy().tobytes() == content[500:]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{}x"])
def test_a_store_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store").write_bytes(content)
    with pytest.raises(DamagedFileError, match="not a complete safetensors"):
        load_store(tmp_path / "store", Host())


def test_compiled_kernels_of_bundle_driver_and_card_have_a_place_of_their_own(
    tiny_bundle: BundleFiles, own_bundle: BundleFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards = ("one card, driver 580.1", "one card, driver 580.2", "another card, driver 580.1")
    files = {cache_file(own_bundle, card) for card in cards}
    assert len(files) == 3
    assert {file.parent for file in files} == {own_bundle.folder.parent / "runtime-cache"}
    first, *_ = (cache_file(own_bundle, card).name for card in cards)
    write_manifest(own_bundle.folder, own_bundle.manifest.model_copy(update={"model": "another"}))
    assert cache_file(own_bundle, cards[0]).name != first

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cache_file(tiny_bundle, cards[0]).parent == tmp_path / "cache" / "adatsq-trt" / "runtime-cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file(tiny_bundle, cards[0]).parent == Path.home() / ".cache" / "adatsq-trt" / "runtime-cache"

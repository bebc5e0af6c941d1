"""Slots for LoRAs where bundles run: filled and emptied on every backend, and refused where they are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.engines.backends import selection
from adatsq_trt.engines.bundle import GRAPH_FOLDER, BundleFiles, Layout, write_manifest
from adatsq_trt.engines.lora_slots import SlotLora, fill_slots
from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.plan_models import write_plan_repository
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from tests.doubles.gpu import book, device, library
from tests.doubles.host_device import HostDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.gpu_runtime.conftest import LAYOUTS, add_plans
from tests.engines.gpu_runtime.test_onnxruntime_gpu import OnHostDevice
from tests.tiny_pipeline import make_flux_bundle

__all__ = ["book", "device", "library"]
RANK, SEEDS, PROMPTS = 3, [5, 6], [0, 1]


@pytest.fixture(scope="module")
def make_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], BundleFiles]:
    """A bundle of one's own."""
    return lambda: make_flux_bundle(
        tmp_path_factory.mktemp("slots") / "run" / "bundle", ("target", "cpu"), lora_slots=RANK
    )


@pytest.fixture(scope="module")
def files(make_files: Callable[[], BundleFiles]) -> BundleFiles:
    return make_files()


def make_lora(slots: LoraSlots, rank: int = RANK, seed: int = 0) -> SlotLora:
    """Of every second layer, with numbers that bfloat16 holds."""
    rng, layers = np.random.default_rng(seed), {}
    for layer, (inputs, outputs) in list(slots.layers.items())[::2]:
        shapes = (inputs, rank), (rank, outputs)
        layers[layer] = tuple(rng.integers(-8, 9, shape).astype(np.float32) / 32 for shape in shapes)
    return SlotLora(f"of rank {rank}", layers)


def draw(bundle: Bundle, quantized: bool = True) -> np.ndarray:
    return bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS), quantized=quantized)


def test_loras_lie_side_by_side() -> None:
    slots = LoraSlots(rank=3, layers={"a": (4, 2), "b": (2, 2)}, pipeline="P", transformer={})
    first, second = (
        SlotLora(n, {"a": (np.full((4, r), v, np.float32), np.full((r, 2), -v, np.float32))})
        for n, r, v in (("one", 1, 1.0), ("two", 2, 2.0))
    )
    filled = fill_slots(slots, [first, second])
    np.testing.assert_array_equal(filled["lora.a.down"], np.array([[1, 2, 2]] * 4))
    np.testing.assert_array_equal(filled["lora.a.up"], np.array([[-1, -1], [-2, -2], [-2, -2]]))
    assert not filled["lora.b.down"].any()
    assert not filled["lora.b.up"].any()
    with pytest.raises(MismatchError, match="LoRA 'one': got rank 1 in layer 'a' together with 3 of those that are"):
        fill_slots(slots, [first, second, first])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_read_them_where_they_are_bound(
    make_files: Callable[[], BundleFiles], library: Library, device: HostDevice, book: PlanBook, layout: Layout
) -> None:
    """On the double of a GPU: brought there once, in bfloat16, and the same picture as the processor's."""
    own = make_files()
    add_plans(own, book, layout, compiler=CompilerDouble())  # the real one is in tests/export
    crossed: list[int] = []
    with Bundle.open(own.folder, "rtx") as plans, Bundle.open(own.folder, "onnxruntime") as processor:
        lora = make_lora(plans.lora_slots)
        before, plain = draw(plans), draw(processor)
        with Transfers() as transfers:
            for bundle in (plans, processor):
                bundle.add_lora(lora)
            loaded = draw(plans)
            plans.denoise(
                plans.noise(SEEDS), plans.conditioning(PROMPTS), callback=lambda _: crossed.append(transfers.to_device)
            )
        wanted = draw(processor)
        change = np.linalg.norm(wanted - plain)
        assert np.linalg.norm(loaded - wanted) < 0.5 * change, "the target's casts"
        assert change > 0.01 * np.linalg.norm(plain)
        assert len(set(crossed)) == 1, "nothing is brought again at a step"
        plans.unload_lora()
        np.testing.assert_array_equal(draw(plans), before)


@pytest.mark.parametrize("quantized", [True, False])
def test_graphs_on_a_gpu(files: BundleFiles, monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    monkeypatch.setattr(selection, "OnnxRuntimeGpuSteps", lambda files, graph: OnHostDevice(files, graph, HostDevice()))
    monkeypatch.setattr(selection, "require_cuda", lambda: None)
    with Bundle(files, "cuda") as bundle, Bundle(files, "onnxruntime") as other:
        before = draw(bundle, quantized)
        for one in (bundle, other):
            one.add_lora(make_lora(one.lora_slots))
        loaded = draw(bundle, quantized)
        np.testing.assert_array_equal(loaded, draw(other, quantized))
        assert not np.array_equal(loaded, before)
        bundle.unload_lora()
        np.testing.assert_array_equal(draw(bundle, quantized), before)


def test_a_lora_that_has_no_room_changes_nothing(files: BundleFiles) -> None:
    """One that was loaded before anything ran counts all the same, until it is unloaded."""
    with Bundle(files, "onnxruntime") as bundle:
        bundle.add_lora(make_lora(bundle.lora_slots, 2, seed=1))
        loaded = draw(bundle)
        with pytest.raises(MismatchError, match=r"got rank 2 in layer .* together with 2 .* have rank 3"):
            bundle.add_lora(make_lora(bundle.lora_slots, 2))
        np.testing.assert_array_equal(draw(bundle), loaded)
        bundle.unload_lora()
        assert not np.array_equal(draw(bundle), loaded)
    with pytest.raises(UserError, match="is closed"):
        bundle.unload_lora()


def test_graphs_with_other_slots_are_refused(files: BundleFiles, tmp_path: Path) -> None:
    folder = shutil.copytree(files.folder, tmp_path / "bundle")
    path = folder / GRAPH_FOLDER / INDEX_NAME
    index = read_json_model(path, GraphIndex)
    graphs = (index.graphs[0].model_copy(update={"lora_inputs": index.graphs[0].lora_inputs[1:]}), *index.graphs[1:])
    write_json_model(path, index.model_copy(update={"graphs": graphs}))
    write_manifest(folder, files.manifest)
    with pytest.raises(DamagedFileError, match="has other slots for LoRAs than the manifest says"):
        BundleFiles.open(folder)


def test_a_servers_own_backend_knows_no_slots(files: BundleFiles, tmp_path: Path) -> None:
    changes = {"backend": "tensorrt", "plans": ({},), "versions": {"tensorrt": "10"}}
    stock = BundleFiles(files.folder, files.manifest.model_copy(update=changes), files.policy, files.index)
    with pytest.raises(UserError, match="has slots for LoRAs, which a stock model would be given anew"):
        write_plan_repository([("flux", stock)], tmp_path / "models")

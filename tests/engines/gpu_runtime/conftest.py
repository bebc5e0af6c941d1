"""Bundles with real plans, run by the runtime of GPUs on a double of the library and of the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx

from adatsq_trt.engines.backends.base import BatchRange, Compiler
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import PLUGIN_LIBRARY as PLUGIN_PATH
from adatsq_trt.engines.bundle import BundleFiles, Layout, write_manifest
from adatsq_trt.engines.plugin_commands import plugin_profiles
from adatsq_trt.formats import TARGETS
from tests.doubles.gpu import book, device, library
from tests.doubles.tensorrt_on_onnxruntime import PLUGIN_LIBRARY, VERSION, PlanBook
from tests.engines.conftest import make_bundle

__all__ = ["book", "device", "library"]
LAYOUTS: tuple[Layout, ...] = ("embedded", "shared", "switch")
BATCH = BatchRange(1, 8, 8, smaller=(2,))


def add_plans(
    bundle: BundleFiles,
    book: PlanBook,
    layout: Layout = "embedded",
    batch: BatchRange = BATCH,
    backend: str = "rtx",
    compiler: Compiler | None = None,
) -> Path:
    """Compile a bundle's plans and note what they compute; the bundle's folder.

    Args:
        bundle: with graphs for targets.
        book: of the double that will run them.
        layout: of the plans.
        batch: their optimization profiles, but for what layout `plugin` makes of them.
        backend: which library they are said to be of.
        compiler: TensorRT-RTX's own unless given.
    """
    versions = {"tensorrt-rtx": tensorrt_rtx.__version__}
    if backend == "tensorrt":
        versions["tensorrt"] = VERSION
    if layout == "plugin":
        graph = bundle.graph("target", None)
        batch = plugin_profiles(graph, len(bundle.policy.assignments), batch)
        (bundle.folder / PLUGIN_PATH).parent.mkdir()
        (bundle.folder / PLUGIN_PATH).write_bytes(PLUGIN_LIBRARY)
    plans = build_plans(bundle.folder, bundle.index, [TARGETS["sm120"]], batch, compiler=compiler, layout=layout)
    changes = {"plans": plans, "layout": layout, "versions": versions, "backend": backend}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update=changes))
    book.enter(BundleFiles.open(bundle.folder), plans, batch.profiles)
    return bundle.folder


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> Callable[[Layout], Path]:
    """Folder of the tiny bundle with plans of a layout; made once."""
    made: dict[Layout, Path] = {}

    def make(layout: Layout) -> Path:
        if layout not in made:
            made[layout] = add_plans(make_bundle(tmp_path_factory.mktemp(layout) / "run" / "bundle"), book, layout)
        return made[layout]

    return make

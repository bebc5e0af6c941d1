"""Every layout in every backend, from Bundle.denoise and from three pipelines: a processor's numbers, bit for bit."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from adatsq_trt.engines.backends import selection
from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.backends.selection import BackendName
from adatsq_trt.engines.bundle import BundleFiles, Layout
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from tests.doubles.host_device import HostDevice, OnDevice
from tests.doubles.processor_with_casts import CastingSteps
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.bundled_pipelines import FRAMES, LENGTH, make_bundled
from tests.engines.gpu_runtime.conftest import add_plans
from tests.engines.gpu_runtime.test_onnxruntime_gpu import OnHostDevice
from tests.tiny_bundle import GUIDANCE, STEPS
from tests.tiny_checkpoints import HEIGHT, WIDTH
from tests.tiny_pipeline import PATCHES, make_adapter, make_flux_bundle

VARIANTS, SEEDS, PROMPTS = ("target", "cpu"), [1, 2], [0, 1]
LAYOUTS: dict[BackendName, tuple[Layout, ...]] = {
    "rtx": ("embedded", "shared", "switch"),
    "tensorrt": ("embedded", "shared", "switch", "plugin"),
    "cuda": ("embedded", "plugin"),  # the others have the graphs of "embedded"
}
PIPELINES = ("flux", "z-image", "wan")
# Every layout, backend and pipeline, each at least once; their product is slow.
FEW = {
    ("flux", "embedded", "rtx"),
    ("flux", "plugin", "tensorrt"),
    ("flux", "plugin", "cuda"),
    ("z-image", "switch", "rtx"),
    ("z-image", "embedded", "cuda"),
    ("wan", "shared", "tensorrt"),
}
ALL = [(name, layout, backend) for name in PIPELINES for backend, layouts in LAYOUTS.items() for layout in layouts]
Made = tuple[DiffusionPipeline, BundleFiles]


class OnProcessor(Bundle):
    """The same bundle with none of the runtime under test: on the processor, with the plans' types."""

    device = torch.device("cpu")

    def runner(self, quantized: bool = True) -> StepRunner:
        if not (quantized and self.choice.plans):
            return super().runner(quantized)
        if quantized not in self._runners:
            self._runners[quantized] = self._resources.enter_context(CastingSteps(self.files))
        return self._runners[quantized]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Layout], Made]:
    """A pipeline, and its transformer's bundle without plans; made once."""
    known: dict[tuple[str, str], Made] = {}

    def export(name: str, layout: Layout) -> Made:
        if (name, layout) not in known:
            folder = tmp_path_factory.mktemp(f"{name}-{layout}") / "bundle"
            if name == "flux":
                files = make_flux_bundle(folder, VARIANTS, layout)
                pipe = FluxPipeline(None, None, None, None, None, None, make_adapter().transformer)
            else:
                pipe, files = make_bundled(name, folder, VARIANTS, layout)
                pipe.text_encoder = pipe.vae = None  # the pipeline would look for its device there
            pipe.set_progress_bar_config(disable=True)
            known[name, layout] = pipe, files
        return known[name, layout]

    return export


@pytest.fixture
def made(exported: Callable[[str, Layout], Made], book: PlanBook, tmp_path: Path) -> Callable[..., Made]:
    """The same with plans of a layout and a library."""

    def make(name: str, layout: Layout, backend: BackendName) -> Made:
        pipe, files = exported(name, "plugin" if layout == "plugin" else "embedded")
        copy = BundleFiles.open(shutil.copytree(files.folder, tmp_path / "run" / "bundle"))
        library = "tensorrt" if layout == "plugin" else "rtx" if backend == "cuda" else backend
        add_plans(copy, book, layout, backend=library, compiler=CompilerDouble())
        return pipe, BundleFiles.open(copy.folder)

    return make


@pytest.fixture
def gpu(library: Library, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The doubles of both libraries of plans, and of ONNX Runtime's provider for GPUs."""
    monkeypatch.setattr(selection, "OnnxRuntimeGpuSteps", lambda files, graph: OnHostDevice(files, graph, device))
    monkeypatch.setattr(selection, "require_cuda", lambda: None)
    return device


def own_loop(bundle: Bundle, guided: bool) -> np.ndarray:
    condition = bundle.conditioning(PROMPTS)
    latents: np.ndarray = bundle.denoise(
        bundle.noise(SEEDS), condition if guided else Conditioning(condition.conditional)
    )
    return latents


def pipeline_loop(name: str, pipe: DiffusionPipeline, bundle: Bundle) -> np.ndarray:
    """All that the pipeline is given lies where the bundle computes."""
    condition, there = bundle.conditioning(PROMPTS), bundle.device
    with OnDevice():
        half, other = (
            {key: torch.from_numpy(value).to(there) for key, value in given.items()}
            for given in (condition.conditional, condition.unconditional or {})
        )
        pipe.transformer = AdatsqTransformer.from_bundle(bundle)
        pipe.scheduler = pipe.transformer.scheduler
        latents = pipe(
            **{"flux": flux_arguments, "z-image": z_image_arguments, "wan": wan_arguments}[name](half, other),
            latents=torch.from_numpy(bundle.noise(SEEDS)).to(there),
            num_inference_steps=STEPS,
            output_type="latent",
            return_dict=False,
        )[0]
    return np.asarray(getattr(latents, "content", latents).float().numpy())


Tensors = Mapping[str, torch.Tensor]


def flux_arguments(half: Tensors, other: Tensors) -> dict[str, Any]:
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    prompts = {argument: half[source] for argument, source in names.items()}
    prompts |= {f"negative_{argument}": other[source] for argument, source in names.items()}
    return {**prompts, "true_cfg_scale": GUIDANCE, "height": 16 * PATCHES, "width": 16 * PATCHES}


def z_image_arguments(half: Tensors, other: Tensors) -> dict[str, Any]:
    prompts, negative = (list(given["encoder_hidden_states"]) for given in (half, other))
    negative *= len(prompts) // len(negative)
    return {"prompt_embeds": prompts, "negative_prompt_embeds": negative, "guidance_scale": GUIDANCE - 1, **_sized()}


def wan_arguments(half: Tensors, other: Tensors) -> dict[str, Any]:
    prompts, negative = half["encoder_hidden_states"], other["encoder_hidden_states"]
    return {
        "prompt_embeds": prompts,
        "negative_prompt_embeds": negative,
        "guidance_scale": GUIDANCE,
        "num_frames": FRAMES,
        **_sized(),
    }


def _sized() -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH}


@pytest.mark.parametrize(
    ("name", "layout", "backend"),
    [pytest.param(*one, marks=() if one in FEW else pytest.mark.slow) for one in ALL],
)
def test_a_processors_numbers(
    name: str,
    layout: Layout,
    backend: BackendName,
    made: Callable[..., Made],
    gpu: HostDevice,
    library: Library,
) -> None:
    pipe, files = made(name, layout, backend)
    with OnProcessor(files, backend if backend != "cuda" else "onnxruntime") as bundle:
        wanted = [own_loop(bundle, True), own_loop(bundle, False), pipeline_loop(name, pipe, bundle)]
    assert not library.log.runs
    with Bundle(files, backend) as bundle:
        got = [own_loop(bundle, True), own_loop(bundle, False), pipeline_loop(name, pipe, bundle)]
    for own, other in zip(got, wanted, strict=True):
        assert np.isfinite(own).all()
        np.testing.assert_array_equal(own, other)
    calls = {"flux": 2, "z-image": 1, "wan": 2}[name]
    assert len(library.log.runs) == (0 if backend == "cuda" else STEPS * (1 + 1 + calls))

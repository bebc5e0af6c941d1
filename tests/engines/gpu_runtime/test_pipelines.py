"""An unmodified FluxPipeline on the double of a GPU: nothing is read back between its steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from tests.doubles.host_device import HostDevice, OnDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import Library, PlanBook
from tests.engines.gpu_runtime.conftest import add_plans
from tests.tiny_bundle import GUIDANCE, STEPS
from tests.tiny_pipeline import PATCHES, make_adapter, make_flux_bundle, make_sized_bundle

VARIANTS = ("target", "cpu")
SEEDS, PROMPTS = [1, 2], [4, 5]
PIXELS = 16 * PATCHES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> Path:
    return add_plans(make_flux_bundle(tmp_path_factory.mktemp("flux") / "run" / "bundle", VARIANTS), book)


@pytest.fixture
def pipe(folder: Path, library: Library) -> Iterator[FluxPipeline]:
    with Bundle.open(folder) as bundle:
        assert bundle.choice.name == "rtx"
        yield make_pipe(bundle)


def make_pipe(bundle: Bundle) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(bundle.manifest.schedule.scheduler_config)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, make_adapter().transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = AdatsqTransformer.from_bundle(bundle)
    return pipe


def run(pipe: FluxPipeline, device: HostDevice, guided: bool = False, **changes: Any) -> np.ndarray:
    """Latents of two samples; everything that the pipeline is given is on the device."""
    bundle = pipe.transformer.bundle
    condition = bundle.conditioning(PROMPTS)
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    given = {name: condition.conditional[source] for name, source in names.items()}
    if guided:
        given |= {f"negative_{name}": condition.unconditional[source] for name, source in names.items()}
    with OnDevice():
        tensors = {name: torch.from_numpy(value).to(device.device) for name, value in given.items()}
        request = {
            **tensors,
            "latents": torch.from_numpy(bundle.noise(SEEDS)).to(device.device),
            "height": PIXELS,
            "width": PIXELS,
            "num_inference_steps": STEPS,
            "true_cfg_scale": GUIDANCE if guided else 1.0,
            "output_type": "latent",
            **changes,
        }
        latents: Tensor = pipe(**request).images
    return latents.content.numpy()


def expected(bundle: Bundle, guided: bool = False) -> np.ndarray:
    condition = bundle.conditioning(PROMPTS)
    return bundle.denoise(bundle.noise(SEEDS), condition if guided else Conditioning(condition.conditional))


def test_the_pipeline_gives_what_the_bundles_own_loop_gives(pipe: FluxPipeline, device: HostDevice) -> None:
    np.testing.assert_array_equal(run(pipe, device), expected(pipe.transformer.bundle))


def test_guidance_in_two_calls_per_step(pipe: FluxPipeline, device: HostDevice, library: Library) -> None:
    wanted = expected(pipe.transformer.bundle, guided=True)
    library.log.runs.clear()
    got = run(pipe, device, guided=True)
    assert len(library.log.runs) == 2 * STEPS
    assert library.log.runs[::2] == library.log.runs[1::2]
    assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("guided", [False, True])
def test_nothing_is_read_back_after_the_first_step(pipe: FluxPipeline, device: HostDevice, guided: bool) -> None:
    crossed: list[tuple[int, int]] = []

    def note(*_: Any) -> dict[str, Any]:
        crossed.append((transfers.to_device, transfers.to_host))
        return {}

    with Transfers() as transfers:
        run(pipe, device, guided, callback_on_step_end=note)
    assert len(crossed) == STEPS
    assert len(set(crossed)) == 1, "bytes crossed after the first step"
    assert transfers.to_host - crossed[-1][1] == 1, "the end reads whether all timesteps were the bundle's"


def test_a_generation_that_was_left_does_not_shift_the_next(pipe: FluxPipeline, device: HostDevice) -> None:
    wanted = run(pipe, device)

    def leave(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(pipe, device, callback_on_step_end=leave)
    np.testing.assert_array_equal(run(pipe, device), wanted)


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 2 * STEPS])
def test_another_number_of_steps_is_told(pipe: FluxPipeline, device: HostDevice, steps: int) -> None:
    with pytest.raises(MismatchError, match=f"call the pipeline with num_inference_steps={STEPS}"):
        run(pipe, device, num_inference_steps=steps)
    np.testing.assert_array_equal(run(pipe, device), expected(pipe.transformer.bundle))


def test_a_loop_that_strays_ends_in_nan(pipe: FluxPipeline, device: HostDevice) -> None:
    """A caller that is no pipeline, and does not say when it ends, gets no number that is wrong."""
    transformer, bundle = pipe.transformer, pipe.transformer.bundle
    condition = bundle.conditioning(PROMPTS).conditional
    with OnDevice():
        there = {name: torch.from_numpy(value).to(device.device) for name, value in condition.items()}
        latents = torch.from_numpy(bundle.noise(SEEDS)).to(device.device)
        ids = transformer._shapes[0].image.shape.grid
        rows, columns = torch.meshgrid(*map(torch.arange, ids), indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        common = {**there, "img_ids": positions, "txt_ids": torch.zeros(8, 3)}
        for step, finite in ((0, True), (1, True), (3, False), (3, False)):
            time = torch.full((2,), bundle.schedule.model_time(step), device=device.device)
            velocity = transformer(latents, timestep=time, **common).sample
            assert velocity.content.isfinite().all() == finite
    with pytest.raises(MismatchError, match="the pipeline's timesteps are not the bundle's, so its latents are NaN"):
        _ = transformer.config


# ------------------------------------------------------------------------------------------------------ several sizes


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory, book: PlanBook) -> Path:
    bundle = make_sized_bundle(tmp_path_factory.mktemp("sizes") / "run" / "bundle", (2, 8), (5, 6), variants=VARIANTS)
    graph = bundle.graph("target", 0)
    grows = next(s.name for s in graph.inputs if any(isinstance(n, str) for n in s.shape[1:]))
    profiles = []
    for shape in bundle.manifest.shapes:
        shapes = {name: value.shape for name, value in bundle.positions(graph, shape.size).items()}
        shapes[grows] = (0, *shape.latent_shape)
        profiles += [Profile(1, 2 * samples, 2 * samples, tuple(shapes.items())) for samples in shape.batches]
    return add_plans(BundleFiles.open(bundle.folder), book, batch=BatchRange.of_sizes(profiles))


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (10, 12)])
def test_every_size_is_near_the_processors(
    sized: Path, library: Library, device: HostDevice, size: tuple[int, int]
) -> None:
    with Bundle.open(sized) as bundle, Bundle.open(sized, "onnxruntime") as other:
        noise, condition = bundle.noise(SEEDS, size), bundle.conditioning(PROMPTS)
        with Transfers() as transfers:
            crossed: list[int] = []
            got = bundle.denoise(noise, condition, size=size, callback=lambda _: crossed.append(transfers.to_device))
        wanted = other.denoise(noise, condition, size=size)
    assert len(set(crossed)) == 1
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_sizes_take_turns_in_one_engine(sized: Path, library: Library) -> None:
    with Bundle.open(sized) as bundle:
        alone = {}
        for size in (*bundle.sizes, *bundle.sizes):
            got = bundle.denoise(bundle.noise(SEEDS, size), bundle.conditioning(PROMPTS), size=size)
            np.testing.assert_array_equal(got, alone.setdefault(size, got))

"""An unmodified FluxPipeline with a bundle in its transformer's place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    POLICY_NAME,
    PROMPTS_NAME,
    SCALES_NAME,
    BundleFiles,
    ImageSpec,
    Manifest,
    ScheduleRecord,
    write_manifest,
)
from adatsq_trt.engines.runtime import Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.files import write_tensors
from adatsq_trt.formats import FORMATS
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.quantize import quantize_nearest
from tests.tiny_flux import make_tiny_flux

STEPS, GUIDANCE, PATCHES, WIDTH = 4, 2.0, 4, 32
PIXELS = 16 * PATCHES  # what the pipeline calls its height: without a VAE it assumes 8 pixels per latent pixel


def make_adapter() -> FluxAdapter:
    return make_tiny_flux(WIDTH, PATCHES, shift=3.0)


@pytest.fixture(scope="module")
def flux_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three buckets over two assignments, with weights rounded to nearest."""
    folder, adapter = tmp_path_factory.mktemp("flux") / "bundle", make_adapter()
    layers = adapter.quantizable_layers()
    rows = [["fp8"] * len(layers), [("bf16", "fp8")[i % 2] for i in range(len(layers))]]
    policy = Policy.from_steps("flux", "0" * 64, list(layers), [rows[step in (1, 2)] for step in range(STEPS)])
    weights = {
        name: {layer: quantize_nearest(module.weight.detach(), FORMATS[name]) for layer, module in layers.items()}
        for name in ("fp8", "bf16")
    }
    with torch.no_grad():
        encoded = adapter.encode(range(len(adapter.prompts)))
        inputs = adapter.guided_inputs(torch.randn(11 - 1, *adapter.latent_shape), 0.5, encoded, 2.0)
    traced = trace(adapter.trace_module(), inputs, "velocity", torch.bfloat16)
    index = export_graphs(traced, policy, weights, folder / GRAPH_FOLDER, "bfloat16", adapter.blocks(), ("cpu",))
    policy.save(folder / POLICY_NAME)
    write_tensors(folder / SCALES_NAME, {"fp8": torch.full((STEPS, len(layers)), 1 / 64)})
    prompts = {f"conditional.{name}": value.clone() for name, value in encoded.conditional.items()}
    prompts |= {f"unconditional.{name}": value[:1].clone() for name, value in (encoded.unconditional or {}).items()}
    write_tensors(folder / PROMPTS_NAME, prompts)
    schedule = adapter.schedule(STEPS)
    manifest = Manifest(
        model="flux",
        architecture=adapter.architecture,
        backend="onnxruntime",
        targets=("sm120",),
        base_type=index.base_type,
        formats=("bf16", "fp8"),
        schedule=ScheduleRecord(
            sigmas=schedule.sigmas, timesteps=schedule.timesteps, scheduler_config=schedule.scheduler_config
        ),
        guidance=GUIDANCE,
        latent_shape=adapter.latent_shape,
        image=ImageSpec(patches=PATCHES, channels=1),
        prompts=len(adapter.prompts),
        plans=(),
        versions={},
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def pipe(flux_bundle: Path) -> FluxPipeline:
    """A pipeline that had another transformer before."""
    config = BundleFiles.open(flux_bundle).manifest.schedule.scheduler_config
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, make_adapter().transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = AdatsqTransformer.from_bundle(flux_bundle)
    return pipe


def run(
    pipe: FluxPipeline, latents: np.ndarray, condition: Conditioning, guided: bool, **changes: object
) -> np.ndarray:
    def embeds(half: dict[str, np.ndarray]) -> list[torch.Tensor]:
        return [torch.from_numpy(half[name]) for name in ("encoder_hidden_states", "pooled_projections")]

    prompt, pooled = embeds(condition.conditional)
    negative = dict(
        zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), embeds(condition.unconditional), strict=True)
    )
    request = {
        "prompt_embeds": prompt,
        "pooled_prompt_embeds": pooled,
        "latents": torch.from_numpy(latents),
        "height": PIXELS,
        "width": PIXELS,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        **(negative | {"true_cfg_scale": GUIDANCE} if guided else {}),
        **changes,
    }
    return pipe(**request).images.numpy()


@pytest.mark.parametrize("guided", [False, True])
def test_the_pipeline_gives_what_the_bundles_own_loop_gives(pipe: FluxPipeline, guided: bool) -> None:
    bundle = pipe.transformer.bundle
    noise, condition = bundle.noise([1, 2, 3]), bundle.conditioning([4, 5, 6])
    wanted = bundle.denoise(noise, condition if guided else Conditioning(condition.conditional))
    got = run(pipe, noise, condition, guided)
    assert np.std(wanted - noise) > 0.01
    # Guided, the pipeline calls the transformer for each half of the batch, which may sum in another order.
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted - noise)


def test_formats_follow_the_timestep(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, steps = pipe.transformer.bundle, []
    predict = bundle.predict
    monkeypatch.setattr(bundle, "predict", lambda step, inputs: steps.append(step) or predict(step, inputs))
    run(pipe, bundle.noise([1]), bundle.conditioning([4]), guided=True)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": STEPS + 1}, "call the pipeline with num_inference_steps=4"),
        ({"height": 2 * PIXELS}, "the bundle was exported for 4 x 4"),
        ({"joint_attention_kwargs": {"scale": 1.0}}, "a bundle takes none"),
    ],
)
def test_requests_that_the_bundle_was_not_made_for(
    pipe: FluxPipeline, changes: dict[str, object], message: str
) -> None:
    bundle = pipe.transformer.bundle
    with pytest.raises(MismatchError, match=message):
        run(pipe, bundle.noise([1]), bundle.conditioning([4]), guided=False, **changes)


def test_another_architecture(tiny_bundle: BundleFiles) -> None:
    with pytest.raises(MismatchError, match=r"holds a TinyModel.*Bundle\.denoise"):
        AdatsqTransformer.from_bundle(tiny_bundle.folder)

"""An unmodified FluxPipeline with a bundle in its transformer's place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError
from tests.tiny_bundle import GUIDANCE, STEPS
from tests.tiny_pipeline import PATCHES, make_adapter, make_flux_bundle

PIXELS = 16 * PATCHES  # what the pipeline calls its height: without a VAE it assumes 8 pixels per latent pixel


@pytest.fixture(scope="module")
def flux_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux_bundle(tmp_path_factory.mktemp("flux") / "bundle").folder


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
    pipe: FluxPipeline,
    latents: np.ndarray,
    condition: Conditioning,
    guided: bool,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> np.ndarray:
    def embeds(half: dict[str, np.ndarray]) -> list[torch.Tensor]:
        return [torch.from_numpy(half[name]).to(dtype) for name in ("encoder_hidden_states", "pooled_projections")]

    prompt, pooled = embeds(condition.conditional)
    negative = dict(
        zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), embeds(condition.unconditional), strict=True)
    )
    request = {
        "prompt_embeds": prompt,
        "pooled_prompt_embeds": pooled,
        "latents": torch.from_numpy(latents).to(dtype),
        "height": PIXELS,
        "width": PIXELS,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        **(negative | {"true_cfg_scale": GUIDANCE} if guided else {}),
        **changes,
    }
    return pipe(**request).images.float().numpy()


@pytest.mark.parametrize("guided", [False, True])
def test_the_pipeline_gives_what_the_bundles_own_loop_gives(pipe: FluxPipeline, guided: bool) -> None:
    bundle = pipe.transformer.bundle
    noise, condition = bundle.noise([1, 2, 3]), bundle.conditioning([4, 5, 6])
    wanted = bundle.denoise(noise, condition if guided else Conditioning(condition.conditional))
    got = run(pipe, noise, condition, guided)
    assert np.std(wanted - noise) > 0.01
    # Guided, the pipeline calls the transformer for each half of the batch, which may sum in another order.
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted - noise)


def test_the_pipeline_runs_in_16_bits_throughout(pipe: FluxPipeline) -> None:
    """Its timesteps are rounded twice."""
    bundle = pipe.transformer.bundle
    noise, condition = bundle.noise([1, 2]), bundle.conditioning([4, 5])
    wanted = bundle.denoise(noise, Conditioning(condition.conditional))
    got = run(pipe, noise, condition, False, dtype=torch.bfloat16)
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted - noise)


def test_formats_follow_the_timestep(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, steps = pipe.transformer.bundle, []
    predict = bundle.predict
    monkeypatch.setattr(bundle, "predict", lambda step, inputs, size: steps.append(step) or predict(step, inputs))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"controlnet_block_samples": [torch.zeros(1)]}, "argument 'controlnet_block_samples' .*: a bundle takes none"),
        ({"guidance": torch.ones(1)}, "argument 'guidance' of the transformer: a bundle takes none"),
        ({"controlnet_blocks_repeat": True}, "argument 'controlnet_blocks_repeat' .*: a bundle takes none"),
        (
            {"controlnet_blocks_repeat": False, "guidance": None},
            "expected each of hidden_states, .*, timestep, img_ids",
        ),
    ],
)
def test_arguments_that_are_not_followed(pipe: FluxPipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        pipe.transformer(**arguments)


def test_arguments_by_place_are_those_by_name(pipe: FluxPipeline) -> None:
    transformer, bundle = pipe.transformer, pipe.transformer.bundle
    condition = {name: torch.from_numpy(v) for name, v in bundle.conditioning([4]).conditional.items()}
    rows, columns = torch.meshgrid(torch.arange(PATCHES), torch.arange(PATCHES), indexing="ij")
    by_name = {
        "hidden_states": torch.from_numpy(bundle.noise([1])),
        **condition,
        "timestep": torch.tensor([bundle.schedule.model_time(1)]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    wanted = transformer(**by_name, return_dict=False)[0]
    assert torch.equal(transformer(*by_name.values()).sample, wanted)
    with pytest.raises(MismatchError, match="txt_ids: got other numbers than zero"):
        transformer(**{**by_name, "txt_ids": torch.ones(8, 3)})
    with pytest.raises(MismatchError, match="once"):
        transformer(*by_name.values(), timestep=by_name["timestep"])

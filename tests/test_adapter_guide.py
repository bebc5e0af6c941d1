"""docs/adapters.md: its code is short and right, and goes from a pipeline to a bundle in that pipeline."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor

import adatsq_trt
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.image import ImageShape
from adatsq_trt.models import families
from adatsq_trt.models.prompts import StoredPrompts

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
STEPS, GUIDANCE, WIDTH, TOKENS, CELLS, PIXELS = 2, 2.0, 32, 9, 8, 16
SMALL = {
    **{"steps": STEPS, "guidance": GUIDANCE, "height": PIXELS, "width": PIXELS},
    # Both formats, whatever the search finds.
    **{"formats": "w8a8s,fp32", "formats_for": ("transformer_blocks.0.*=w8a8s", "transformer_blocks.1.*=fp32")},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2, "beam": 2, "candidates": 2},
}


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return block


@pytest.fixture(scope="module")
def registered(code: str) -> Iterator[families.Family]:
    """The page's family, known for as long as these tests run, in the place of the package's own."""
    own = families.family_of_transformer("SD3Transformer2DModel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_FAMILIES", list(families.families()))
        exec(compile(code, str(PAGE), "exec"), {"__name__": "family_of_the_guide"})
        family = families.family_of_transformer("SD3Transformer2DModel")
        assert family is not own
        yield family


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """Random weights, and no text encoders: prompts are encoded already."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=CELLS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=CELLS,
        )
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer.eval(), scheduler, vae, *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encodings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (3, TOKENS, WIDTH), "pooled": (3, WIDTH)}
    shapes |= {"negative_tokens": (TOKENS, WIDTH), "negative_pooled": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_it_is_short(code: str) -> None:
    assert len(code.splitlines()) < 110


@torch.no_grad()
def test_it_computes_what_diffusers_computes(
    registered: families.Family, pipe: StableDiffusion3Pipeline, encodings: dict[str, Tensor]
) -> None:
    tokens, pooled = (torch.cat([encodings[n], encodings[f"negative_{n}"][None]]) for n in ("tokens", "pooled"))
    prompts = StoredPrompts("abc", tokens, pooled)
    adapter = registered.adapter(pipe.transformer, prompts, pipe.scheduler, ImageShape(CELLS, 4, 1))
    latent = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = adapter.model_inputs(latent, 0.25, adapter.encode([0, 1]).conditional, GUIDANCE)
    wanted = adapter.transformer(**{**inputs, "timestep": torch.full((2,), 250.0)}, return_dict=False)[0]
    assert torch.equal(adapter.predict(inputs), wanted)


@pytest.fixture(scope="module")
def bundle(
    registered: families.Family,
    pipe: StableDiffusion3Pipeline,
    encodings: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> adatsq_trt.Bundle:
    folder = tmp_path_factory.mktemp("sd3")
    save_file(encodings, folder / "encodings.safetensors")
    return adatsq_trt.build(
        pipe, target="cpu", output=folder / "run", encodings=folder / "encodings.safetensors", **SMALL
    )


def test_its_graphs_give_what_the_fake_quantized_model_gives(bundle: adatsq_trt.Bundle, tmp_path: Path) -> None:
    assert set(bundle.manifest.formats) == {"w8a8s", "fp32"}
    assert adatsq_trt.check(bundle, output=tmp_path).passed


def test_its_bundle_runs_in_the_pipeline(
    bundle: adatsq_trt.Bundle, pipe: StableDiffusion3Pipeline, encodings: dict[str, Tensor]
) -> None:
    noise, own = bundle.noise([1, 2]), pipe.transformer
    wanted = bundle.denoise(noise, bundle.conditioning([0, 2]))
    request = {
        "prompt_embeds": encodings["tokens"][[0, 2]],
        "pooled_prompt_embeds": encodings["pooled"][[0, 2]],
        "negative_prompt_embeds": encodings["negative_tokens"].repeat(2, 1, 1),
        "negative_pooled_prompt_embeds": encodings["negative_pooled"].repeat(2, 1),
    }
    pipe.transformer = bundle.transformer()
    try:
        got = pipe(
            **request,
            latents=torch.from_numpy(noise),
            **{"height": PIXELS, "width": PIXELS, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
            **{"output_type": "latent", "return_dict": False},
        )[0].numpy()
        with pytest.raises(MismatchError, match=r"argument 'block_controlnet_hidden_states' .*: a bundle takes none"):
            pipe.transformer(block_controlnet_hidden_states=[torch.zeros(1)])
    finally:
        pipe.transformer = own
    assert np.std(wanted - noise) > 0.01
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted - noise)


def test_without_encodings_text_encoders_are_needed(
    registered: families.Family, pipe: StableDiffusion3Pipeline
) -> None:
    with pytest.raises(UserError, match=r"the pipeline has no text_encoder.*encodings=FILE"):
        adatsq_trt.build(pipe, target="cpu", **SMALL)

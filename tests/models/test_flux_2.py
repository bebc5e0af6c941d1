"""The adapter of FLUX.2 against diffusers' real class with random weights, and what its pipelines' options decide."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.errors import DependencyError, UserError
from adatsq_trt.models import family as module
from adatsq_trt.models.families import family_of_pipeline
from adatsq_trt.models.flux_2 import Flux2Adapter, dynamic_shift
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH
from tests.tiny_flux_2 import make_distilled_klein_pipeline, make_tiny_flux_2


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "klein"])
def adapter(request: pytest.FixtureRequest) -> Flux2Adapter:
    return make_tiny_flux_2(guidance_embeds=request.param)


@torch.no_grad()
def original(adapter: Flux2Adapter, inputs: dict[str, Tensor]) -> Tensor:
    """What diffusers' module predicts; a position is a picture, a row, a column and a place in the text."""
    rows, columns = adapter.image.grid
    image = torch.tensor([[0, row, column, 0] for row in range(rows) for column in range(columns)])
    text = torch.tensor([[0, 0, 0, place] for place in range(adapter.encoder.text_tokens)])
    output: Tensor = adapter.transformer(**inputs, img_ids=image[None], txt_ids=text[None], return_dict=False)[0]
    return output


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (2, 6), (5, 5)])
def test_the_trace_computes_what_diffusers_computes_at_every_size(adapter: Flux2Adapter, grid: tuple[int, int]) -> None:
    """Three sizes have as many tokens; their positions differ."""
    other = adapter.resized(adapter.image.resized(*grid))
    latent = torch.randn(3, *other.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = other.model_inputs(latent, 0.3, other.encode([0, 2, 3]).conditional, 2.5)
    assert ("guidance" in inputs) == other.guidance_distilled
    wanted, got = original(other, inputs), other.predict(inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    opened = other.any_size()
    assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), got)
    changes = [{"timestep": inputs["timestep"] + 0.1}]
    changes += [{"guidance": inputs["guidance"] + 1}] if "guidance" in inputs else []
    for change in changes:
        assert (other.predict({**inputs, **change}) - got).norm() > 1e-4 * got.norm()


def test_time_and_guidance_are_waves_of_float32_numbers() -> None:
    """In bfloat16 the two times would be one, as would the two scales."""
    trace = make_tiny_flux_2().trace_module().bfloat16()
    like = torch.zeros(1, dtype=torch.bfloat16)
    one, later = (trace._embedded(torch.tensor([t]), torch.tensor([4.0]), like) for t in (0.9, 0.9005))
    assert one.dtype is torch.bfloat16
    assert not torch.equal(one, later)
    assert not torch.equal(one, trace._embedded(torch.tensor([0.9]), torch.tensor([4.01]), like))


def test_layers_of_several_projections_are_quantized(adapter: Flux2Adapter) -> None:
    """Of the blocks all are; embedders, modulation and the last projection lie outside of them."""
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = set(adapter.quantizable_layers())
    assert {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_in"} <= layers
    assert layers == {name for name in linears if "transformer_blocks." in name}


@pytest.mark.parametrize("tokens", [12, 1024, 4096, 4301, 16384])
def test_the_shift_follows_size_and_steps_as_in_diffusers(tokens: int) -> None:
    for steps in (1, 4, 10, 28, 50, 200):
        assert dynamic_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_a_pipeline_that_says_that_it_is_distilled_has_no_second_branch(tmp_path: Path) -> None:
    make_distilled_klein_pipeline().save_pretrained(tmp_path)
    settings = PipelineSettings(path=str(tmp_path), height=HEIGHT, width=WIDTH, prompts=("a red",))
    outline = open_pipeline(settings).outline
    assert outline.adapter.guidance_distilled
    assert not outline.adapter.takes_guidance
    assert outline.default_steps == 4
    with pytest.raises(UserError, match="--negative-prompt 'three': guidance takes no second branch here"):
        open_pipeline(settings.model_copy(update={"negative_prompt": "three"}))
    klein = family_of_pipeline("Flux2KleinPipeline")
    assert klein is not None
    assert klein.guided  # of others
    assert klein.configured({"is_distilled": False}).defaults({}) == (50, 4.0)


def test_a_processor_of_images_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.2 dev comes with one, which also reads texts."""
    dev = family_of_pipeline("Flux2Pipeline")
    assert dev is not None
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    dev.configured({"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}).require_libraries()
    own = dev.configured({"tokenizer": ["transformers", "PixtralProcessor"]})
    assert own.text_call is not None
    assert own.text_call.library == "torchvision"
    with pytest.raises(DependencyError, match="Flux2Pipeline reads its prompts with the library torchvision"):
        own.require_libraries()

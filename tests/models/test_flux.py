"""The Flux adapter on diffusers' real class with random weights."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from adatsq_trt.models.adapter import Conditioning
from adatsq_trt.models.flux import FluxAdapter, pack
from examples.zoo.scenes.train_flux import make_adapter


def latents(adapter: FluxAdapter, batch: int) -> torch.Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


def test_the_linears_of_all_blocks_are_quantizable_and_no_others(untrained_flux: FluxAdapter) -> None:
    layers = untrained_flux.quantizable_layers()
    # 2 double blocks of 12 and 4 single blocks of 5.
    assert len(layers) == 44
    assert sum(name.startswith("transformer_blocks.0.") for name in layers) == 12
    assert sum(name.startswith("single_transformer_blocks.3.") for name in layers) == 5
    linears = {n for n, m in untrained_flux.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    left = linears - set(layers)
    assert all(any(part in name for part in ("norm", "embed")) or name == "proj_out" for name in left), left


@torch.no_grad()
def test_every_quantizable_layer_takes_part_in_a_prediction(untrained_flux: FluxAdapter) -> None:
    seen: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, layer in untrained_flux.quantizable_layers().items()
    ]
    conditioning = untrained_flux.encode([3])
    untrained_flux.velocity(latents(untrained_flux, 1), 1.0, conditioning, 2.0)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == sorted(untrained_flux.quantizable_layers())


@torch.no_grad()
def test_guided_inputs_hold_both_branches_in_one_batch(untrained_flux: FluxAdapter) -> None:
    latent, conditioning = latents(untrained_flux, 3), untrained_flux.encode([0, 5, 9])
    inputs = untrained_flux.guided_inputs(latent, 0.5, conditioning, 2.0)
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    assert shapes == {
        "hidden_states": (6, 16, 4),
        "encoder_hidden_states": (6, 1, 32),
        "pooled_projections": (6, 32),
        "timestep": (6,),
    }
    assert torch.equal(inputs["hidden_states"][:3], inputs["hidden_states"][3:])
    assert inputs["timestep"].tolist() == [0.5] * 6
    table = untrained_flux.encoder.embedding.weight
    assert torch.equal(inputs["pooled_projections"], table[[0, 5, 9, 10, 10, 10]])


@torch.no_grad()
def test_inputs_come_in_the_order_of_the_traced_arguments(untrained_flux: FluxAdapter) -> None:
    inputs = untrained_flux.model_inputs(
        latents(untrained_flux, 2), 0.5, untrained_flux.encode([1, 2]).conditional, 2.0
    )
    by_name = untrained_flux.trace_module()(**inputs)
    assert torch.equal(untrained_flux.predict(inputs), by_name)
    assert by_name.shape == inputs["hidden_states"].shape


@torch.no_grad()
def test_trace_module_is_the_transformer_with_flux_position_ids(untrained_flux: FluxAdapter) -> None:
    inputs = untrained_flux.model_inputs(
        latents(untrained_flux, 2), 0.5, untrained_flux.encode([1, 2]).conditional, 2.0
    )
    # As the Flux pipeline numbers its tokens: (0, row, column), text tokens all zero.
    ids = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
    expected = untrained_flux.transformer(**inputs, img_ids=ids, txt_ids=torch.zeros(1, 3), return_dict=False)[0]
    assert torch.equal(untrained_flux.predict(inputs), expected)


@torch.no_grad()
def test_guidance_extrapolates_from_the_unguided_branch(untrained_flux: FluxAdapter) -> None:
    latent, conditioning = latents(untrained_flux, 2), untrained_flux.encode([4, 7])
    conditional = untrained_flux.predict(untrained_flux.model_inputs(latent, 0.7, conditioning.conditional, 2.0))
    assert conditioning.unconditional is not None
    other = untrained_flux.predict(untrained_flux.model_inputs(latent, 0.7, conditioning.unconditional, 2.0))
    for guidance, expected in ((1.0, conditional), (0.0, other), (2.0, 2 * conditional - other)):
        velocity = untrained_flux.velocity(latent, 0.7, conditioning, guidance)
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert (conditional - other).abs().max() > 1e-3


def test_conditioning_can_be_cut(untrained_flux: FluxAdapter) -> None:
    whole, part = untrained_flux.encode([1, 2, 3]), untrained_flux.encode([2, 3])
    cut = whole[1:3]
    assert cut.unconditional is not None
    assert part.unconditional is not None
    for name in part.conditional:
        assert torch.equal(cut.conditional[name], part.conditional[name])
        assert torch.equal(cut.unconditional[name], part.unconditional[name])
    assert Conditioning(whole.conditional, None)[0:1].unconditional is None


def test_decode_undoes_pack(untrained_flux: FluxAdapter) -> None:
    images = torch.rand(5, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    packed = pack(images)
    assert packed.shape == (5, *untrained_flux.latent_shape)
    torch.testing.assert_close(untrained_flux.decode(packed), images)


def test_a_token_is_a_patch_of_two_by_two_pixels(untrained_flux: FluxAdapter) -> None:
    images = torch.zeros(1, 8, 8, 1)
    images[0, 2:4, 4:6, 0] = 1  # row 1, column 2 of the 4 x 4 patches
    assert (pack(images)[0] == 1).all(dim=1).nonzero().tolist() == [[1 * 4 + 2]]
    assert untrained_flux.decode(pack(images) * 3).max() == 1  # clamped


@pytest.mark.parametrize("steps", [1, 20])
def test_schedule_is_that_of_the_adapters_scheduler(untrained_flux: FluxAdapter, steps: int) -> None:
    assert untrained_flux.schedule(steps).steps == steps


@pytest.fixture(scope="module")
def distilled() -> FluxAdapter:
    """A Flux dev in small: sentences, a guidance embedding, patches of 4x4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_adapter(guidance_embeds=True)


@torch.no_grad()
def test_a_guidance_embedding_takes_the_scale_and_needs_one_branch(distilled: FluxAdapter) -> None:
    latent, conditioning = latents(distilled, 2), distilled.encode([0, 7])
    assert conditioning.unconditional is None
    inputs = distilled.guided_inputs(latent, 0.5, conditioning, 3.5)
    assert list(inputs) == ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"]
    assert inputs["encoder_hidden_states"].shape == (2, 8, 64)
    assert inputs["guidance"].tolist() == [3.5] * 2
    ids = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
    expected = distilled.transformer(**inputs, img_ids=ids, txt_ids=torch.zeros(8, 3), return_dict=False)[0]
    assert torch.equal(distilled.velocity(latent, 0.5, conditioning, 3.5), expected)
    assert (distilled.velocity(latent, 0.5, conditioning, 1.0) - expected).abs().max() > 1e-3


def test_decode_undoes_pack_for_other_patches(distilled: FluxAdapter) -> None:
    images = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    packed = pack(images, 4)
    assert packed.shape == (5, *distilled.latent_shape)
    torch.testing.assert_close(distilled.decode(packed), images)
    torch.testing.assert_close(packed[:, 1 * 4 + 2].mean(1), images[:, 4:8, 8:12].mean((1, 2, 3)) * 2 - 1)


def test_who_takes_a_guidance_scale(untrained_flux: FluxAdapter, distilled: FluxAdapter) -> None:
    assert untrained_flux.takes_guidance
    assert distilled.takes_guidance
    assert not make_adapter(guidance_embeds=False).takes_guidance


def test_copies_of_the_weights_are_computed_with_and_the_weights_come_back(untrained_flux: FluxAdapter) -> None:
    module = untrained_flux.trace_module()
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    inputs = untrained_flux.guided_inputs(
        torch.ones(1, *untrained_flux.latent_shape), 0.5, untrained_flux.encode([1]), 2.0
    )
    with torch.no_grad():
        exact = untrained_flux.predict(inputs)
        with untrained_flux.placed(torch.device("cpu"), torch.bfloat16):
            assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
            assert {b.dtype for b in module.buffers()} == {torch.float32}, "bfloat16 would change positions"
            with torch.autocast("cpu", torch.bfloat16):
                rounded = untrained_flux.predict(inputs)
        assert torch.equal(untrained_flux.predict(inputs), exact)
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(after[name] is tensor for name, tensor in own.items())
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.03


def test_the_weights_come_back_after_an_error_too(untrained_flux: FluxAdapter) -> None:
    weight = untrained_flux.transformer.x_embedder.weight
    with (
        pytest.raises(RuntimeError, match="stop"),
        untrained_flux.placed(torch.device("cpu"), torch.bfloat16),
    ):
        raise RuntimeError("stop")
    assert untrained_flux.transformer.x_embedder.weight is weight


def test_a_table_of_frequencies_gives_diffusers_own_sines(untrained_flux: FluxAdapter) -> None:
    """Bit for bit, at the largest scales of guidance too."""
    times = torch.cat([torch.linspace(0, 1000, 101), torch.tensor([3500.0, 30_000.0])])
    own = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
    tabled = untrained_flux.transformer.time_text_embed.time_proj
    assert not isinstance(tabled, Timesteps)
    assert torch.equal(tabled(times), own(times))

"""The fake-quantized model against linear layers written out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.formats import FORMATS, format_named
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SharedRounding, SimulatedLinear, SimulatedModel
from adatsq_trt.quantizers import dequantize_weight, fake_quantize_activation, quantize_nearest

STEPS = 2
NAMES = ("w4a4", "w3a4g32", "w8a8", "w8a8s", "fp8", "nvfp4", "bf16", "fp32")
LAYER = "single_transformer_blocks.1.proj_mlp"


@pytest.fixture(scope="module")
def store(untrained_flux: FluxAdapter) -> CandidateWeights:
    layers = untrained_flux.quantizable_layers()
    weights = {
        name: {layer: quantize_nearest(linear.weight.detach(), format_named(name)) for layer, linear in layers.items()}
        for name in NAMES
    }
    # Different at every step and layer, so that a wrong row or column shows.
    steps = torch.arange(STEPS * len(layers), dtype=torch.float32).reshape(STEPS, -1)
    scales = {n: (0.01 + 0.001 * steps).bfloat16().float() for n in NAMES if format_named(n).scaled_activation}
    return CandidateWeights(weights, scales)


@pytest.fixture
def model(untrained_flux: FluxAdapter, store: CandidateWeights) -> SimulatedModel:
    return SimulatedModel(untrained_flux, store)


def inputs(adapter: FluxAdapter) -> dict[str, Tensor]:
    latent = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    return adapter.guided_inputs(latent, 0.6, adapter.encode([2, 7]), 2.0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", range(STEPS))
def test_a_layer_multiplies_rounded_inputs_with_rounded_weights(
    model: SimulatedModel, store: CandidateWeights, name: str, step: int
) -> None:
    fmt, index = format_named(name), model.layers.index(LAYER)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    with model.installed():
        model.assign(dict.fromkeys(model.layers, fmt), step)
        linear = model.adapter.transformer.get_submodule(LAYER)
        assert isinstance(linear, SimulatedLinear)
        got = linear(x)
    scale = store.scales[name][step, index] if fmt.scaled_activation else None
    weight = dequantize_weight(store.weights[name][LAYER], fmt)
    expected = functional.linear(fake_quantize_activation(x, fmt.activation, scale), weight, linear.original.bias)
    assert torch.equal(got, expected)
    assert torch.equal(got, linear.original(x)) == (name == "fp32")


@torch.no_grad()
def test_the_whole_model_is_the_one_with_hand_made_hooks(model: SimulatedModel, store: CandidateWeights) -> None:
    adapter, step = model.adapter, 1
    assert isinstance(adapter, FluxAdapter)
    formats = {layer: format_named(NAMES[i % len(NAMES)]) for i, layer in enumerate(model.layers)}
    with model.installed():
        model.assign(formats, step)
        got = adapter.predict(inputs(adapter))

    def hook(index: int, layer: str):  # type: ignore[no-untyped-def]
        fmt = formats[layer]
        scale = store.scales[fmt.name][step, index] if fmt.scaled_activation else None

        def replace(module: nn.Module, arguments: tuple[Tensor], _output: Tensor) -> Tensor:
            weight = dequantize_weight(store.weights[fmt.name][layer], fmt)
            return functional.linear(fake_quantize_activation(arguments[0], fmt.activation, scale), weight, module.bias)

        return replace

    linears = adapter.quantizable_layers()
    handles = [linear.register_forward_hook(hook(i, layer)) for i, (layer, linear) in enumerate(linears.items())]
    expected = adapter.predict(inputs(adapter))
    for handle in handles:
        handle.remove()
    assert torch.equal(got, expected)


@torch.no_grad()
def test_without_an_assignment_it_is_exactly_the_full_precision_model(model: SimulatedModel) -> None:
    adapter = model.adapter
    assert isinstance(adapter, FluxAdapter)
    exact = adapter.predict(inputs(adapter))
    with model.installed():
        assert torch.equal(adapter.predict(inputs(adapter)), exact)
        model.assign(dict.fromkeys(model.layers, FORMATS["w4a4"]), 0)
        assert not torch.equal(adapter.predict(inputs(adapter)), exact)
        model.assign(None, 0)
        assert torch.equal(adapter.predict(inputs(adapter)), exact)


@torch.no_grad()
def test_static_scales_are_those_of_the_step(model: SimulatedModel) -> None:
    adapter, predictions = model.adapter, []
    assert isinstance(adapter, FluxAdapter)
    with model.installed():
        for step in (0, 1, 0):
            model.assign(dict.fromkeys(model.layers, FORMATS["w8a8s"]), step)
            predictions.append(adapter.predict(inputs(adapter)))
    assert torch.equal(predictions[0], predictions[2])
    assert not torch.equal(predictions[0], predictions[1])


def test_the_original_layers_come_back(model: SimulatedModel) -> None:
    before = dict(model.adapter.transformer.named_modules())
    with model.installed() as installed:
        assert installed is model
        assert isinstance(model.adapter.transformer.get_submodule(LAYER), SimulatedLinear)
    assert dict(model.adapter.transformer.named_modules()) == before


def test_the_original_layers_come_back_after_an_exception(model: SimulatedModel) -> None:
    before = dict(model.adapter.transformer.named_modules())
    with pytest.raises(KeyboardInterrupt), model.installed():
        raise KeyboardInterrupt
    assert dict(model.adapter.transformer.named_modules()) == before


def test_layers_are_in_the_adapters_order(model: SimulatedModel, untrained_flux: FluxAdapter) -> None:
    assert model.layers == tuple(untrained_flux.quantizable_layers())


def test_layers_that_share_an_input_share_its_rounding_until_it_changes() -> None:
    shared, x = SharedRounding(), torch.randn(3, 64)
    grid = FORMATS["w4a4"].activation
    first = shared.round(x, grid, None)
    assert shared.round(x, grid, None) is first
    assert shared.round(x.clone(), grid, None) is not first
    before = shared.round(x, grid, None).clone()
    x.mul_(2)
    assert not torch.equal(shared.round(x, grid, None), before)


def test_static_scales_are_told_apart() -> None:
    shared, x = SharedRounding(), torch.randn(3, 64)
    grid = FORMATS["fp8"].activation
    coarse, fine = (shared.round(x, grid, torch.tensor(s)) for s in (0.5, 0.01))
    assert not torch.equal(coarse, fine)


@torch.no_grad()
def test_noise_is_of_its_size_the_same_for_equal_tokens_and_ends_with_the_block(model: SimulatedModel) -> None:
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(1, 4, 64)
    with model.installed():
        linear = model.adapter.transformer.get_submodule(LAYER)
        seen: list[Tensor] = []
        linear.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
        before = linear(x)
        with model.input_noise(2.0**-8, seed=0):
            linear(x)
            linear(x)
        assert torch.equal(linear(x), before)
    assert torch.equal(seen[1], seen[2])  # layers that share an input share its noise
    assert torch.equal(seen[1], seen[1][:, :1].expand_as(x))
    noise = (seen[1] - x)[0, 0] / x.square().mean().sqrt()
    assert float(noise.square().mean().sqrt()) == pytest.approx(2.0**-8, rel=0.5)


@torch.no_grad()
def test_noise_that_crosses_ties_spreads(model: SimulatedModel) -> None:
    given = inputs(model.adapter)
    with model.installed():
        model.assign(dict.fromkeys(model.layers, FORMATS["nvfp4"]), 0)
        expected = model.adapter.predict(given)
        with model.input_noise(2.0**-16, seed=0):
            got = model.adapter.predict(given)
    error = float((got - expected).norm() / expected.norm())
    assert error > 2.0**-16
